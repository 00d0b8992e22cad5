"""Heat maps and masks as pictures."""

import numpy as np
import pytest
import torch

from carsam.data.images.transforms import Geometry
from carsam.diagnose.pictures import (
    HEAT_SIDE,
    MASK_SIDE,
    ZOOM_SIDE,
    heat_picture,
    mask_picture,
    shrink,
    viridis,
    zoom_picture,
    zoom_region,
)


def test_viridis_is_even_in_lightness():
    assert viridis(np.array([-1.0, 0.0])).round().tolist() == [[68, 1, 84]] * 2
    assert viridis(np.array([1.0, 7.0])).round().tolist() == [[253, 231, 37]] * 2
    lightness = viridis(np.linspace(0, 1, 50)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness) > 0).all()


def test_shrink():
    image = np.zeros((400, 1000, 3), dtype=np.uint8)
    small, factor = shrink(image, 500)
    assert small.shape == (200, 500, 3)
    assert factor == 0.5
    assert shrink(image, 2000) == (image, 1.0)


@pytest.mark.parametrize("cell", [(1, 2), (7, 0), (0, 15)])
def test_heat_lies_where_the_attention_is(cell):
    """A wide image fills the upper half of the padded frame: cells there keep their place."""
    image = np.full((400, 800, 3), 128, dtype=np.uint8)
    geometry = Geometry((400, 800), (128, 256))
    grid = torch.zeros(16, 16)
    grid[cell] = 0.5
    picture = np.array(heat_picture(image, grid.flatten(), 0.5, geometry, 256, [780, 380, 790, 390]))
    assert picture.shape == (HEAT_SIDE // 2, HEAT_SIDE, 3)
    side = HEAT_SIDE // 16
    warm = picture[..., 1].astype(float) - picture[..., 2]  # yellow and green against purple
    row, column = np.unravel_index(warm[:170, :370].argmax(), (170, 370))
    assert (row // side, column // side) == cell


def test_heat_is_scaled_to_the_given_peak():
    image = np.zeros((256, 256, 3), dtype=np.uint8)
    geometry = Geometry((256, 256), (256, 256))
    pictures = [heat_picture(image, torch.full((256,), v), 0.02, geometry, 256, [0, 0, 9, 9]) for v in (0.02, 0.002)]
    strong, weak = (np.array(picture).astype(int)[200, 200] for picture in pictures)
    assert strong.sum() > 2 * weak.sum()


def test_masks_are_drawn_in_the_colour_of_their_box():
    image = np.full((1200, 600, 3), 255, dtype=np.uint8)
    masks = [np.zeros((1200, 600), dtype=bool) for _ in range(2)]
    masks[0][100:500, 100:500] = True
    masks[1][700:900, 100:500] = True
    boxes = np.array([[100, 100, 500, 500], [100, 700, 500, 900.0]])
    picture = np.array(mask_picture(image, masks, boxes)).astype(int)
    assert picture.shape == (MASK_SIDE, MASK_SIDE // 2, 3)
    first, second, outside = picture[128, 128], picture[341, 128], picture[480, 128]
    assert first[0] > first[2] + 50
    assert second[2] > second[0] + 50
    assert (outside == 255).all()


@pytest.mark.parametrize(
    ("box", "region"),
    [
        ((100, 100, 120, 140), (70, 80, 150, 160)),
        ((0, 0, 10, 10), (0, 0, 32, 32)),
        ((395, 295, 400, 300), (368, 268, 400, 300)),
        ((10, 0, 30, 200), (0, 0, 400, 300)),
    ],
)
def test_zoom_region(box, region):
    """A square around the box, inside the image of 400 × 300 pixels."""
    assert zoom_region(box, (300, 400)) == region


def test_zoom_shows_its_part_enlarged():
    image = np.full((300, 400, 3), 255, dtype=np.uint8)
    mask = np.zeros((300, 400), dtype=bool)
    mask[110:130, 105:115] = True
    picture = np.array(zoom_picture(image, mask, [100, 100, 120, 140], (70, 80, 150, 160), 0)).astype(int)
    assert picture.shape == (ZOOM_SIDE, ZOOM_SIDE, 3)
    # Four pixels for one: the mask's middle is tinted in the first colour, the corner is not.
    assert picture[160, 160, 0] > picture[160, 160, 2] + 50
    assert (picture[310, 310] == 255).all()
