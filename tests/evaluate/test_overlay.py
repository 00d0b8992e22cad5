"""Pictures."""

import numpy as np
import pytest

from carsam.evaluate.overlay import PALETTE, color_of, comparison, overlay

GREY = np.full((60, 80, 3), 100, dtype=np.uint8)


def square():
    mask = np.zeros((60, 80), dtype=bool)
    mask[20:40, 20:50] = True
    return mask


def test_overlay_tints_inside_and_leaves_outside():
    before = GREY.copy()
    picture = overlay(GREY, square(), (255, 0, 0))
    assert np.array_equal(GREY, before)
    assert picture.shape == GREY.shape and picture.dtype == np.uint8
    assert picture[30, 35].tolist() == [170, 55, 55]  # 55 % grey, 45 % red
    assert picture[20, 20].tolist() == [255, 0, 0]  # contour
    assert picture[19, 30].tolist() == [255, 255, 255]  # its outline
    assert picture[5, 5].tolist() == [100, 100, 100]


def test_lines_are_wider_on_large_pictures_and_end_at_the_edge():
    mask = np.zeros((400, 1000), dtype=bool)
    mask[:, :500] = True
    picture = overlay(np.full((400, 1000, 3), 100, dtype=np.uint8), mask, (255, 0, 0))
    row = [picture[0, x].tolist() for x in (0, 495, 496, 499, 500, 503, 504)]
    inside, outside = [170, 55, 55], [100, 100, 100]
    assert row == [inside, inside, [255, 0, 0], [255, 0, 0], [255, 255, 255], [255, 255, 255], outside]


def test_box_is_drawn():
    picture = overlay(GREY, np.zeros((60, 80), dtype=bool), (0, 255, 0), box=[10, 10, 70, 50])
    assert picture[10, 12].tolist() == [0, 255, 0]
    assert picture[30, 40].tolist() == [100, 100, 100]


def test_colors_differ():
    assert len(set(PALETTE)) == len(PALETTE) >= 8
    assert color_of(len(PALETTE)) == color_of(0)


@pytest.mark.parametrize("size", [(60, 80), (900, 1600), (2000, 300), (1, 1)])
@pytest.mark.parametrize("n_panels", [1, 2, 4])
def test_comparison_fits(size, n_panels):
    image = np.zeros((*size, 3), dtype=np.uint8)
    mask = np.ones(size, dtype=bool)
    panels = [(f"model {i}, with a title that is far too long for its panel", mask, 0.5) for i in range(n_panels)]
    picture = comparison(image, panels, [[0, 0, size[1], size[0]]])
    assert picture.mode == "RGB" and picture.width <= 1502 and picture.height <= 1600


def test_comparison_of_several_objects():
    masks = np.stack([square(), ~square()])
    picture = comparison(GREY, [("float", masks, 0.9), ("4-bit", list(masks), None)])
    assert len(picture.getcolors(1 << 20)) > 10


def test_wrong_sizes():
    with pytest.raises(ValueError, match="resize the mask"):
        overlay(GREY, np.zeros((6, 8), dtype=bool), (0, 0, 0))
    with pytest.raises(ValueError, match="'float'"):
        comparison(GREY, [("float", np.zeros((6, 8), dtype=bool), None)])
