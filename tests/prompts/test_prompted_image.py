"""An image with its prompts: boxes in the image and in the input frame are the same boxes."""

import numpy as np
import torch

import carsam
from carsam.data.coco.annotations import CocoAnnotation, CocoImage
from carsam.data.coco.instances import CocoInstances
from carsam.data.images.transforms import Geometry
from carsam.prompts.image import PromptedImage, object_boxes

GEOMETRY = Geometry((200, 100), (256, 128))
PIXELS = torch.zeros(1, 3, 256, 256)


def test_boxes_in_both_frames():
    image = PromptedImage.with_image_boxes("a", PIXELS, GEOMETRY, np.array([[10.0, 20.0, 50.0, 100.0]]))
    assert image.boxes.dtype == torch.float32
    assert np.allclose(image.boxes, [[12.8, 25.6, 64, 128]])
    back = PromptedImage.with_input_boxes("a", PIXELS, GEOMETRY, image.boxes)
    assert torch.equal(back.boxes, image.boxes)
    assert back.image_boxes.dtype == np.float64
    assert np.allclose(back.image_boxes, image.image_boxes, rtol=1e-6)
    assert back.true_mask(0) is None


def test_public_name_takes_pixels_and_boxes():
    image = carsam.CalibrationImage("a", PIXELS, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    inputs = image.inputs(torch.device("cpu"))
    assert inputs["input_boxes"].tolist() == [[[1, 2, 3, 4]]]
    assert inputs["pixel_values"] is PIXELS and inputs["multimask_output"] is False


def test_object_boxes(tmp_path):
    """Crowds are no prompts; boxes are clipped before their area counts."""
    boxes = [(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 9.0, 11.0), (-5.0, 0.0, 12.0, 10.0), (0.0, 0.0, 50.0, 50.0)]
    image = CocoImage(1, "a.jpg", 40, 30)
    objects = tuple(CocoAnnotation(i, 1, 1, box, iscrowd=i == 3) for i, box in enumerate(boxes))
    found, usable = object_boxes(CocoInstances(tmp_path, (image,), {1: objects}, ()), image)
    assert found.tolist() == [[0, 0, 10, 10], [0, 0, 9, 11], [0, 0, 7, 10]]
    assert usable.tolist() == [True, False, False]
