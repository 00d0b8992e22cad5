"""SamPredictor: segment-anything's interface, and agreement with the model's own forward."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import EVALUATION_IMAGES, NANO
from transformers import SamModel

import carsam
from carsam.data.images.reading import read_image
from carsam.data.images.transforms import Preprocessor
from carsam.predict.predictor import ResizeLongestSide, SamPredictor, encode_image, predict_logits

IMAGE = EVALUATION_IMAGES / "000000000885.jpg"
BOX = np.array([220, 95, 325, 240])
POINTS, LABELS = np.array([[270, 150], [100, 50]]), np.array([1, 0])


@pytest.fixture(scope="module")
def model(nano):
    return nano


@pytest.fixture(scope="module")
def image():
    return read_image(IMAGE)


@pytest.fixture
def predictor(model, image):
    predictor = SamPredictor(model)
    predictor.set_image(image)
    return predictor


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize(
    "prompt",
    [
        {"box": BOX},
        {"box": BOX[None]},
        {"box": BOX.tolist()},
        {"point_coords": POINTS, "point_labels": LABELS},
        {"point_coords": POINTS, "point_labels": LABELS, "box": BOX},
        {"mask_input": np.zeros((1, 64, 64), np.float32)},
        {"box": BOX, "mask_input": np.zeros((1, 64, 64), np.float32)},
        {},
    ],
    ids=lambda prompt: "+".join(prompt) or "nothing",
)
def test_predict_shapes_and_types(predictor, image, prompt, multimask):
    masks, iou, low_res = predictor.predict(**prompt, multimask_output=multimask)
    n = 3 if multimask else 1
    assert masks.shape == (n, *image.shape[:2]) and masks.dtype == bool
    assert iou.shape == (n,) and iou.dtype == np.float32
    assert low_res.shape == (n, 64, 64) and low_res.dtype == np.float32
    logits, _, _ = predictor.predict(**prompt, multimask_output=multimask, return_logits=True)
    assert logits.dtype == np.float32 and np.array_equal(logits > 0, masks)


def forward(model, image, **inputs):
    pixels, geometry = Preprocessor.for_model(model)(image)
    with torch.no_grad():
        output = model(pixel_values=pixels, multimask_output=True, **inputs)
    return output.pred_masks[0].numpy(), output.iou_scores[0].numpy(), geometry


def test_box_equals_forward(model, predictor, image):
    _, iou, low_res = predictor.predict(box=BOX)
    box = torch.from_numpy(predictor.transform.apply_boxes(BOX, image.shape[:2])).float()[None]
    expected, scores, _ = forward(model, image, input_boxes=box)
    assert np.allclose(low_res, expected[0], atol=1e-4) and np.allclose(iou, scores[0], atol=1e-5)


def test_points_and_mask_equal_forward(model, predictor, image):
    mask = np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32)
    _, iou, low_res = predictor.predict(POINTS, LABELS, mask_input=mask)
    points = torch.from_numpy(predictor.transform.apply_coords(POINTS, image.shape[:2])).float()[None, None]
    labels = torch.from_numpy(LABELS)[None, None]
    inputs = {"input_points": points, "input_labels": labels, "input_masks": torch.from_numpy(mask)[None]}
    expected, scores, _ = forward(model, image, **inputs)
    assert np.allclose(low_res, expected[0], atol=1e-4) and np.allclose(iou, scores[0], atol=1e-5)


@pytest.mark.parametrize("with_masks", ["none", "one for all", "one each"])
@pytest.mark.parametrize("with_boxes", [True, False])
def test_a_batch_equals_its_prompts_one_by_one(predictor, with_masks, with_boxes):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 2, 2, generator=generator) * 170
    labels = torch.tensor([[1, 0], [1, 1], [0, 1]])
    boxes = torch.tensor([[10.0, 10, 90, 90], [50, 40, 200, 160], [0, 0, 255, 170]]) if with_boxes else None
    n_masks = {"none": 0, "one for all": 1, "one each": 3}[with_masks]
    masks = torch.randn(n_masks, 1, 64, 64, generator=generator) * 5 if n_masks else None
    together = predictor.predict_torch(points, labels, boxes, masks, return_logits=True)
    assert together[0].shape == (3, 3, *predictor.original_size) and together[2].shape == (3, 3, 64, 64)
    for i in range(3):
        part = slice(i, i + 1)
        box = None if boxes is None else boxes[part]
        mask = None if masks is None else masks[part if n_masks == 3 else slice(0, 1)]
        alone = predictor.predict_torch(points[part], labels[part], box, mask, return_logits=True)
        for whole, single in zip(together, alone):
            assert torch.allclose(whole[part], single, atol=1e-3)


def test_masks_alone_as_a_batch(predictor):
    masks = torch.randn(2, 1, 64, 64)
    both = predictor.predict_torch(None, None, None, masks)[2]
    one = predictor.predict_torch(None, None, None, masks[1:])[2]
    assert both.shape == (2, 3, 64, 64) and torch.allclose(both[1:], one, atol=1e-3)


def test_a_prediction_feeds_the_next(predictor):
    _, iou, low_res = predictor.predict(box=BOX)
    masks, _, _ = predictor.predict(box=BOX, mask_input=low_res[[iou.argmax()]], multimask_output=False)
    assert masks.shape[0] == 1


def test_bgr(model, image, predictor):
    other = SamPredictor(model)
    other.set_image(image[..., ::-1], image_format="BGR")
    assert torch.equal(other.get_image_embedding(), predictor.get_image_embedding())


def test_set_torch_image(predictor, image):
    expected, size = predictor.features, predictor.input_size
    resized = torch.as_tensor(predictor.transform.apply_image(image)).permute(2, 0, 1)[None]
    predictor.set_torch_image(resized, image.shape[:2])
    assert torch.equal(predictor.features, expected)
    assert predictor.original_size == image.shape[:2] and predictor.input_size == size == (171, 256)
    for size in (image.shape[1::-1], (342,), (0, 0), None):
        with pytest.raises(ValueError, match=r"\(height, width\)"):
            predictor.set_torch_image(resized, size)
    with pytest.raises(ValueError, match="NaN"):
        predictor.set_torch_image(resized.float() * float("nan"), image.shape[:2])
    for wrong in (resized[0], resized[:, :2], resized[..., :100]):
        with pytest.raises(ValueError, match="long side 256"):
            predictor.set_torch_image(wrong, image.shape[:2])


def test_state(model, image):
    predictor = SamPredictor(model)
    assert not predictor.is_image_set and predictor.device == torch.device("cpu")
    for call in (predictor.predict, predictor.get_image_embedding, lambda: predictor.predict_torch(None, None)):
        with pytest.raises(RuntimeError, match="image must be set"):
            call()
    predictor.set_image(image)
    assert predictor.is_image_set and predictor.get_image_embedding().shape == (1, 256, 16, 16)
    assert predictor.features is predictor.get_image_embedding()
    predictor.reset_image()
    assert not predictor.is_image_set and predictor.features is None and predictor.original_size is None
    with pytest.raises(RuntimeError):
        predictor.predict(box=BOX)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": POINTS}, "point_labels must be supplied"),
        ({"point_coords": POINTS, "point_labels": LABELS[:1]}, "labels"),
        ({"point_coords": POINTS[0], "point_labels": LABELS}, "points must be"),
        ({"box": BOX[:3]}, "4 numbers"),
        ({"box": np.stack([BOX, BOX])}, "predict_torch"),
        ({"box": BOX, "mask_input": np.zeros((1, 32, 32))}, "64, 64"),
        ({"box": BOX, "mask_input": np.zeros((64, 64))}, "64, 64"),
        ({"point_labels": LABELS}, "without point_coords"),
        ({"point_coords": POINTS, "point_labels": np.array([1, 2])}, "labels must be 1"),
        ({"point_coords": POINTS * np.nan, "point_labels": LABELS}, "point_coords holds NaN"),
        ({"point_coords": POINTS, "point_labels": [1, None]}, "point_labels"),
        ({"point_coords": [[1, 2], [3]], "point_labels": LABELS}, "array of numbers"),
        ({"point_coords": "a", "point_labels": LABELS}, "array of numbers"),
        ({"box": [1, 2, 30, 4j]}, "array of numbers: it holds complex"),
        ({"box": 5}, "4 numbers"),
        ({"box": [1, 2, np.inf, 4]}, "box holds NaN or infinite"),
        ({"box": ["a", 2, 3, 4]}, "array of numbers"),
        ({"box": [220, 240, 105, 145]}, "upside down"),
        ({"box": BOX, "mask_input": np.full((1, 64, 64), np.nan)}, "mask_input holds NaN"),
    ],
)
def test_predict_refuses(predictor, prompt, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompt)


def test_predict_torch_refuses(predictor):
    points, labels = torch.zeros(2, 1, 2), torch.ones(2, 1)
    for arguments, message in [
        ((points, labels, torch.zeros(3, 4)), "as many boxes"),
        ((points, labels, torch.zeros(2, 5)), "boxes must be"),
        ((points, labels, torch.zeros(2, 2, 4)), "boxes must be"),
        ((points, labels, None, torch.zeros(3, 1, 64, 64)), "as many mask inputs"),
        ((points, None), "together"),
        ((points[0], labels), "points must be"),
        ((points, labels, torch.full((2, 4), float("nan"))), "boxes hold NaN"),
        ((points / 0, labels), "points hold NaN"),
        ((points, 3 * labels), "labels must be 1"),
        ((points, labels / 0), "labels hold NaN"),
        ((points, [[1], [1]]), "labels must be a real tensor, not list"),
        ((None, None, np.zeros((1, 4))), "boxes must be a real tensor, not ndarray"),
        ((None, None, torch.zeros(1, 4, dtype=torch.complex64)), "not torch.complex64"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictor.predict_torch(*arguments)


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        (np.zeros((4, 4), np.uint8), "repeat the grey channel"),
        (np.zeros((4, 4, 1), np.uint8), "repeat the grey channel"),
        (np.zeros((4, 4, 4), np.uint8), r"image\[..., :3\]"),
        (np.zeros((3, 4, 5), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((4, 4, 3)), "255 \\* image"),
        (np.zeros((4, 4, 3), np.uint16), "scale its values to 0..255"),
        (np.zeros((4, 4, 3), bool), "astype"),
        (np.zeros((4, 4, 3), object), "astype"),
        (np.zeros((1, 4, 4, 3), np.uint8), "one image at a time"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 0, 3), np.uint8), "no pixels"),
        (np.zeros(0), "no pixels"),
        (Image.new("RGB", (4, 4)), r"np\.asarray\(image\.convert\('RGB'\)\)"),
        ("photo.jpg", r"carsam\.read_image\('photo.jpg'\)"),
        (Path("photo.jpg"), r"carsam\.read_image"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"image\.cpu\(\)\.numpy\(\)"),
        ([[[0, 0, 0]]], r"np\.asarray\(image\)"),
        (None, "not builtins.NoneType"),
    ],
)
def test_set_image_refuses(model, wrong, fix):
    with pytest.raises(ValueError, match="uint8") as caught:
        SamPredictor(model).set_image(wrong)
    assert re.search(fix, str(caught.value))


def test_images_that_only_look_odd(model, predictor, image):
    """Views that are read backwards, read-only arrays and single pixels are images."""
    other = SamPredictor(model)
    view = image[:, ::-1][:, ::-1]
    view.flags.writeable = False
    other.set_image(view)
    assert torch.equal(other.features, predictor.features)
    for size in ((1, 1), (1, 3000), (3000, 1)):
        other.set_image(np.zeros((*size, 3), np.uint8))
        assert other.predict(box=[0, 0, 1, 1])[0].shape == (3, *size)


def test_zero_boxes_give_zero_masks(predictor, image):
    size = image.shape[:2]
    for logits in (True, False):
        masks, iou, low_res = predictor.predict_torch(None, None, torch.zeros(0, 4), return_logits=logits)
        assert masks.shape == (0, 3, *size) and iou.shape == (0, 3) and low_res.shape == (0, 3, 64, 64)
        masks, iou, low_res = predictor.predict(box=np.zeros((0, 4)), multimask_output=False, return_logits=logits)
        assert masks.shape == (0, *size) and iou.shape == (0,) and low_res.shape == (0, 64, 64)
    assert predictor.predict_torch(torch.zeros(0, 2, 2), torch.zeros(0, 2))[0].shape == (0, 3, *size)
    assert predictor.transform.apply_boxes(np.zeros((0, 4)), size).shape == (0, 4)


def test_masks_in_chunks_are_the_same(predictor, monkeypatch):
    boxes = torch.tensor([[10.0, 10, 90, 90], [50, 40, 200, 160]])
    expected = predictor.predict_torch(None, None, boxes)[0]
    monkeypatch.setattr("carsam.predict.predictor.CHUNK_PIXELS", 1)
    assert torch.equal(predictor.predict_torch(None, None, boxes)[0], expected)
    assert torch.equal(predictor.predict_torch(None, None, boxes, return_logits=True)[0] > 0, expected)


def test_set_image_refuses_other_formats(model, image):
    with pytest.raises(ValueError, match="RGB or BGR"):
        SamPredictor(model).set_image(image, "HSV")


def test_mask_threshold_of_the_model(predictor, model):
    logits, _, _ = predictor.predict(box=BOX, return_logits=True)
    model.mask_threshold = 2.0
    try:
        masks, _, _ = predictor.predict(box=BOX)
    finally:
        del model.mask_threshold
    assert np.array_equal(masks, logits > 2.0) and predictor.mask_threshold == 0.0


def test_half_precision(image):
    model = SamModel.from_pretrained(NANO, dtype=torch.bfloat16, attn_implementation="eager")
    predictor = SamPredictor(model)
    predictor.set_image(image)
    mask = np.zeros((1, 64, 64), np.float32)
    for prompt in ({"box": BOX}, {"point_coords": POINTS, "point_labels": LABELS, "mask_input": mask}):
        masks, iou, low_res = predictor.predict(**prompt)
        assert masks.dtype == bool and iou.dtype == low_res.dtype == np.float32


def test_functions_below_the_predictor(model, image, predictor):
    pixels, geometry = Preprocessor.for_model(model)(image)
    embeddings = encode_image(model, pixels)
    assert torch.equal(embeddings, predictor.features)
    boxes = torch.from_numpy(geometry.boxes_to_input(BOX[None])).float()
    low_res, iou = predict_logits(model, embeddings, boxes=boxes)
    assert low_res.shape == (1, 1, 64, 64) and iou.shape == (1, 1)
    assert torch.equal(predict_logits(model, embeddings, boxes=boxes[:, None])[0], low_res)


def test_transform():
    transform = ResizeLongestSide(256)
    assert transform.get_preprocess_shape(100, 200, 256) == (128, 256)
    assert transform.apply_image(np.zeros((100, 200, 3), np.uint8)).shape == (128, 256, 3)
    assert transform.apply_image_torch(torch.zeros(1, 3, 100, 200)).shape == (1, 3, 128, 256)
    assert transform.apply_coords(np.array([[100, 50]]), (100, 200)).tolist() == [[128, 64]]
    assert transform.apply_coords_torch(torch.tensor([[[100, 50]]]), (100, 200)).tolist() == [[[128, 64]]]
    assert transform.apply_boxes(np.array([0, 0, 100, 50]), (100, 200)).tolist() == [[0, 0, 128, 64]]
    assert transform.apply_boxes_torch(torch.tensor([[0, 0, 100, 50]]), (100, 200)).tolist() == [[0, 0, 128, 64]]
    coords = np.array([[100, 50]])
    transform.apply_coords(coords, (100, 200))
    assert coords.tolist() == [[100, 50]]


def test_a_packed_model_is_not_quantized_again(packed_folder, calibration_folder):
    packed = carsam.load(packed_folder)
    with pytest.raises(ValueError, match="packed already; quantize the float model"):
        carsam.quantize(packed, calibration_folder / "images")
