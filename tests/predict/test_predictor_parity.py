"""SamPredictor against segment-anything's own, on the same weights."""

import meta_sam
import numpy as np
import pytest
import torch
from places import EVALUATION_IMAGES as IMAGES
from places import NANO
from transformers import SamModel

from carsam.data.images.reading import read_image
from carsam.predict.predictor import SamPredictor

TOLERANCE = 1e-3  # logits

BOX = np.array([220, 95, 325, 240])
POINTS, LABELS = np.array([[270, 150], [100, 50], [300, 200]]), np.array([1, 0, 1])
MASK = np.random.default_rng(0).normal(scale=4, size=(1, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return SamModel.from_pretrained(NANO, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def meta(model):
    """Meta's ``Sam`` of the embedded model's dimensions and weights, and Meta's package."""
    return meta_sam.meta_twin(model), meta_sam.package()


@pytest.fixture(scope="module", params=sorted(p.name for p in IMAGES.iterdir())[:2])
def predictors(request, meta, model):
    """Meta's and ours, with the same image set."""
    sam, package = meta
    both = package.SamPredictor(sam), SamPredictor(model)
    for predictor in both:
        predictor.set_image(read_image(IMAGES / request.param))
    return both


def assert_same(theirs, ours):
    for a, b in zip(theirs, ours):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.abs(a.astype(np.float32) - b).max() < TOLERANCE


def test_state(predictors):
    theirs, ours = predictors
    assert theirs.original_size == ours.original_size and theirs.input_size == ours.input_size
    assert torch.allclose(theirs.get_image_embedding(), ours.get_image_embedding(), atol=1e-4)


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize(
    "prompt",
    [
        {"box": BOX},
        {"point_coords": POINTS, "point_labels": LABELS},
        {"point_coords": POINTS[:1], "point_labels": LABELS[:1]},
        {"point_coords": POINTS, "point_labels": LABELS, "box": BOX},
        {"mask_input": MASK},
        {"box": BOX, "mask_input": MASK},
        {"point_coords": POINTS, "point_labels": LABELS, "mask_input": MASK},
        {"point_coords": POINTS, "point_labels": LABELS, "box": BOX, "mask_input": MASK},
        {},
    ],
    ids=lambda prompt: "+".join(prompt) or "nothing",
)
def test_predict(predictors, prompt, multimask_output):
    theirs, ours = (p.predict(**prompt, multimask_output=multimask_output, return_logits=True) for p in predictors)
    assert_same(theirs, ours)
    masks = [p.predict(**prompt, multimask_output=multimask_output)[0] for p in predictors]
    assert masks[0].dtype == masks[1].dtype == bool
    assert (masks[0] != masks[1]).mean() < 1e-4


@pytest.mark.parametrize("n_masks", [0, 1, 2])
@pytest.mark.parametrize("with_boxes", [True, False])
def test_predict_torch_with_a_batch(predictors, n_masks, with_boxes):
    size = predictors[0].original_size
    transform = predictors[0].transform
    points = transform.apply_coords_torch(torch.from_numpy(np.stack([POINTS, POINTS[::-1].copy()])), size)
    labels = torch.tensor([[1, 0, 1], [1, 1, -1]])
    boxes = transform.apply_boxes_torch(torch.from_numpy(np.stack([BOX, BOX // 2])), size) if with_boxes else None
    masks = torch.from_numpy(MASK)[None].expand(n_masks, -1, -1, -1) * torch.arange(1, n_masks + 1).view(-1, 1, 1, 1)
    arguments = (points, labels, boxes, masks if n_masks else None)
    assert_same(*(p.predict_torch(*arguments, return_logits=True) for p in predictors))


def test_transform(predictors):
    theirs, ours = (p.transform for p in predictors)
    image = np.random.default_rng(0).integers(0, 256, (123, 77, 3), dtype=np.uint8)
    assert np.array_equal(theirs.apply_image(image), ours.apply_image(image))
    for name in ("apply_coords", "apply_boxes"):
        values = POINTS if name == "apply_coords" else np.stack([BOX, BOX])
        assert np.array_equal(getattr(theirs, name)(values, (123, 77)), getattr(ours, name)(values, (123, 77)))
        tensors = [getattr(t, f"{name}_torch")(torch.from_numpy(values), (123, 77)) for t in (theirs, ours)]
        assert torch.allclose(*tensors) and tensors[0].dtype == tensors[1].dtype
