"""transformers' processor with the model against SamPredictor: the same pixels, the same masks, float and packed."""

import json

import numpy as np
import pytest
import torch
from transformers import SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

import carsam
from carsam.data.images.normalisation import UNIT, set_normalisation
from carsam.data.images.reading import read_image
from carsam.data.images.transforms import preprocessor_config

BOX = [60.0, 40.0, 300.0, 200.0]


def both(model, folder, image):
    """Masks and logits of the two ways."""
    processor = SamProcessor(SamImageProcessorPil.from_pretrained(folder))
    inputs = processor(image, input_boxes=[[BOX]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(
            pixel_values=inputs["pixel_values"],
            input_boxes=inputs["input_boxes"].float(),
            multimask_output=False,
        )
    theirs = processor.image_processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )[0][0]
    predictor = carsam.SamPredictor(model)
    predictor.set_image(image)
    ours, _, low_res = predictor.predict(box=np.array(BOX), multimask_output=False)
    return (theirs.numpy(), outputs.pred_masks[0, 0].numpy()), (ours, low_res)


@pytest.fixture(scope="module")
def image(evaluation_folder):
    return read_image(sorted((evaluation_folder / "images").iterdir())[0])


@pytest.mark.parametrize("own", [False, True], ids=["ImageNet", "unit"])
def test_float(fresh_nano, tmp_path, image, own):
    if own:
        set_normalisation(fresh_nano, UNIT)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(fresh_nano)))
    (theirs, their_logits), (ours, our_logits) = both(fresh_nano, tmp_path, image)
    assert np.abs(their_logits - our_logits).max() < 1e-4
    assert (theirs == ours).mean() > 0.9999


def test_packed(packed_folder, image):
    (theirs, their_logits), (ours, our_logits) = both(carsam.load(packed_folder), packed_folder, image)
    assert np.array_equal(their_logits, our_logits)
    assert np.array_equal(theirs, ours)
