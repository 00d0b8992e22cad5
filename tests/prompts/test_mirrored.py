"""Mirror images of calibration images: pixels and boxes go together, and no judge sees what taught."""

import pytest
import torch

from carsam.data.images.transforms import Geometry
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage
from carsam.prompts.mirrored import JUDGED, mirrored, with_mirrored


def image(number, side=32, size=(24, 20)):
    """An object of ones on zeros in the input frame, its box around it, padding of −1 at the right and below."""
    pixels = torch.full((1, 3, side, side), -1.0)
    pixels[..., : size[0], : size[1]] = 0
    pixels[..., 3:9, 2:7] = 1
    geometry = Geometry(size, size)
    return PromptedImage.with_input_boxes(str(number), pixels, geometry, torch.tensor([[2.0, 3.0, 7.0, 9.0]]))


def test_the_box_lies_around_the_object_and_the_padding_where_it_was():
    given = image(0)
    found = mirrored(given)
    left, top, right, bottom = found.boxes[0].int().tolist()
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert torch.equal(found.pixel_values[0, 0] == 1, inside)
    assert torch.equal(found.pixel_values == -1, given.pixel_values == -1)
    assert (found.name, found.geometry, found.truth) == ("0 (mirrored)", None, None)
    assert torch.equal(given.pixel_values, image(0).pixel_values)
    assert mirrored(found) is None  # how it lies in the frame is not known any more


@pytest.mark.parametrize("count", [1, 3, 8, 30])
def test_images_come_first_and_their_mirror_images_judge_where_they_do(count):
    data = CalibrationSet.of([image(number) for number in range(count)], skipped=2)
    both = with_mirrored(data)
    assert both.images[:count] == data.images and len(both.images) == 2 * count and both.skipped == 2
    assert both.fingerprint != data.fingerprint
    names = [each.name for each in both.images]
    assert sorted(names[count:]) == sorted(f"{name} (mirrored)" for name in names[:count])
    together = sum(names.index(name.split()[0]) % JUDGED == at % JUDGED for at, name in enumerate(names))
    # But for those that came round to the end.
    assert together >= 2 * count - count % JUDGED


def test_embeddings_stay_with_their_images():
    data = CalibrationSet.of([image(0), image(1)])
    known = data.with_embeddings([(data.images[1].pixel_values, torch.ones(1))])
    assert with_mirrored(known).embedding(0) is None
    assert torch.equal(with_mirrored(known).embedding(1), torch.ones(1))
    assert [with_mirrored(known).embedding(index) for index in (2, 3)] == [None, None]


def test_an_image_without_geometry_is_not_mirrored_and_a_warning_says_so(caplog):
    bare = PromptedImage("bare", torch.zeros(1, 3, 8, 8), torch.tensor([[1.0, 1.0, 4.0, 4.0]]))
    assert len(with_mirrored(CalibrationSet.of([bare, image(0)])).images) == 3
    assert "1 of 2 calibration images are not mirrored" in caplog.text
