"""segment-anything's own predictor, mask generator, batched forward and ONNX wrapper over carsam's models."""

import copy

import meta_sam
import numpy as np
import pytest
import torch

import carsam
from carsam.data.images.reading import read_image
from carsam.data.images.transforms import Preprocessor

BOX = np.array([220, 95, 325, 240])
POINTS, LABELS = np.array([[270, 150], [100, 50]]), np.array([1, 0])
MASK = np.random.default_rng(0).normal(scale=4, size=(1, 64, 64)).astype(np.float32)
PROMPTS = [
    {"box": BOX},
    {"point_coords": POINTS, "point_labels": LABELS},
    {"point_coords": POINTS, "point_labels": LABELS, "box": BOX, "mask_input": MASK},
    {},
]
# Below the best of the embedded model's masks, which the defaults would leave out.
THRESHOLDS = {"pred_iou_thresh": 0.1, "stability_score_thresh": 0.1}


@pytest.fixture(scope="module")
def package():
    return meta_sam.package()


@pytest.fixture(scope="module")
def image(evaluation_folder):
    return read_image(evaluation_folder / "images" / "000000000885.jpg")


@pytest.fixture(scope="module", params=["float", "packed"])
def model(request, nano):
    return nano if request.param == "float" else carsam.load(request.getfixturevalue("packed_folder"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Meta's model with weights that its package drew, and carsam's reading of their file."""
    torch.manual_seed(0)
    sam = meta_sam.small_sam()
    for head in (*sam.mask_decoder.output_hypernetworks_mlps, sam.mask_decoder.iou_prediction_head):
        head.layers[-1].weight.data.mul_(10)  # else the logits are so small that a tolerance says nothing
    path = tmp_path_factory.mktemp("drawn") / "sam.pth"
    torch.save(sam.state_dict(), path)
    return sam, carsam.load_model(path)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: "+".join(prompt) or "nothing")
def test_its_predictor_gives_carsams_masks(package, model, image, prompt):
    theirs, ours = package.SamPredictor(carsam.as_segment_anything(model)), carsam.SamPredictor(model)
    for predictor in (theirs, ours):
        predictor.set_image(image)
    assert theirs.original_size == ours.original_size and theirs.input_size == ours.input_size
    for multimask in (True, False):
        results = [p.predict(**prompt, multimask_output=multimask) for p in (theirs, ours)]
        for a, b in zip(*results):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert np.array_equal(a, b)


def test_its_own_weights_give_its_own_masks(package, drawn, image):
    sam, model = drawn
    expected, actual = (package.SamPredictor(m) for m in (sam, carsam.as_segment_anything(model)))
    for predictor in (expected, actual):
        predictor.set_image(image)
    for prompt in PROMPTS:
        a, b = (p.predict(**prompt, return_logits=True)[0] for p in (expected, actual))
        assert a.std() > 0.1
        assert np.abs(a - b).max() < 1e-3
        assert ((a > 0) != (b > 0)).mean() < 1e-4


def test_batched_forward_is_its_own(package, drawn, image):
    sam, model = drawn
    transform = package.utils.transforms.ResizeLongestSide(256)
    size = image.shape[:2]
    small = torch.as_tensor(transform.apply_image(image)).permute(2, 0, 1)
    boxes = transform.apply_boxes_torch(torch.tensor(np.stack([BOX, BOX // 2])), size)
    points = transform.apply_coords_torch(torch.tensor(POINTS), size)[None]
    batch = [
        {"image": small, "original_size": size, "boxes": boxes},
        {"image": small[:, :100], "original_size": (200, size[1]), "point_coords": points,
         "point_labels": torch.tensor(LABELS)[None], "mask_inputs": torch.tensor(MASK)[None]},
        {"image": small, "original_size": size},
    ]  # fmt: skip
    for multimask in (True, False):
        for expected, actual in zip(sam(batch, multimask), carsam.as_segment_anything(model)(batch, multimask)):
            assert expected.keys() == actual.keys()
            for key in expected:
                assert expected[key].shape == actual[key].shape and expected[key].dtype == actual[key].dtype
            assert torch.allclose(expected["low_res_logits"], actual["low_res_logits"], atol=1e-3)
            assert torch.allclose(expected["iou_predictions"], actual["iou_predictions"], atol=1e-3)
            assert (expected["masks"] != actual["masks"]).float().mean() < 1e-4


def test_its_mask_generator_runs(package, model, image):
    settings = {"points_per_side": 6, **THRESHOLDS}
    theirs = package.SamAutomaticMaskGenerator(carsam.as_segment_anything(model), **settings).generate(image)
    ours = carsam.SamAutomaticMaskGenerator(model, **settings).generate(image)
    assert len(theirs) == len(ours) > 0
    for a, b in zip(theirs, ours):
        assert a.keys() == b.keys()
        assert np.array_equal(a["segmentation"], b["segmentation"])


def test_its_onnx_model(package, drawn):
    """The module of its export notebook computes the same with either model."""
    import importlib

    sam, model = drawn
    onnx_model = importlib.import_module("segment_anything.utils.onnx").SamOnnxModel
    embeddings = torch.randn(1, 256, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {
        "image_embeddings": embeddings,
        "point_coords": torch.tensor([[[120.0, 80.0], [30.0, 20.0], [0.0, 0.0]]]),
        "point_labels": torch.tensor([[1.0, 0.0, -1.0]]),
        "mask_input": torch.tensor(MASK)[None],
        "has_mask_input": torch.ones(1),
        "orig_im_size": torch.tensor([342.0, 512.0]),
    }
    for single in (True, False):
        results = [onnx_model(m, return_single_mask=single)(**inputs) for m in (sam, carsam.as_segment_anything(model))]
        for expected, actual in zip(*results):
            assert expected.shape == actual.shape
            assert torch.allclose(expected, actual, atol=1e-3)


def test_parts_and_weights(package, nano):
    ours, theirs = carsam.as_segment_anything(nano), meta_sam.meta_twin(nano)
    assert ours.image_encoder.img_size == theirs.image_encoder.img_size == 256
    for name in ("embed_dim", "image_embedding_size", "input_image_size", "mask_input_size", "num_point_embeddings"):
        assert getattr(ours.prompt_encoder, name) == getattr(theirs.prompt_encoder, name)
    for name in ("num_mask_tokens", "num_multimask_outputs", "transformer_dim"):
        assert getattr(ours.mask_decoder, name) == getattr(theirs.mask_decoder, name)
    assert ours.mask_threshold == theirs.mask_threshold and ours.image_format == theirs.image_format
    assert ours.device == theirs.device
    assert torch.equal(ours.pixel_mean, theirs.pixel_mean) and torch.equal(ours.pixel_std, theirs.pixel_std)
    assert torch.allclose(ours.prompt_encoder.get_dense_pe(), theirs.prompt_encoder.get_dense_pe(), atol=1e-6)
    coords = torch.rand(2, 3, 2) * 256
    encoded = [sam.prompt_encoder.pe_layer.forward_with_coords(coords, (256, 200)) for sam in (ours, theirs)]
    assert torch.allclose(*encoded, atol=1e-5)
    pixels = torch.rand(3, 120, 256) * 255
    assert torch.allclose(ours.preprocess(pixels), theirs.preprocess(pixels), atol=1e-5)
    # To the last bit, it is the preprocessing of all of carsam: the model's own normalisation.
    assert torch.equal(ours.preprocess(pixels), Preprocessor.for_model(nano).normalise(pixels[None])[0])
    # The weights are the model's own, each once.
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in nano.parameters())
    assert {p.data_ptr() for p in ours.parameters()} == {p.data_ptr() for p in nano.parameters()}
    assert not ours.training


def test_to_and_copies_keep_the_model(nano):
    sam = copy.deepcopy(carsam.as_segment_anything(nano)).to(torch.float64)
    assert sam.sam_model.vision_encoder is sam.image_encoder.vision_encoder
    assert sam.sam_model.dtype == torch.float64 and nano.dtype == torch.float32


def test_gradients_reach_the_decoder(fresh_nano, package):
    """As fine-tuning with segment-anything's parts does."""
    sam = carsam.as_segment_anything(fresh_nano.requires_grad_(True))
    embeddings = sam.image_encoder(torch.zeros(1, 3, 256, 256))
    sparse, dense = sam.prompt_encoder(points=None, boxes=torch.tensor([[10.0, 10, 90, 90]]), masks=None)
    masks, _ = sam.mask_decoder(embeddings, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)
    masks.sum().backward()
    assert float(sam.mask_decoder.decoder.mask_tokens.weight.grad.abs().sum()) > 0
    assert float(next(sam.image_encoder.parameters()).grad.abs().sum()) > 0


def test_zero_boxes(package, nano, image):
    predictor = package.SamPredictor(carsam.as_segment_anything(nano))
    predictor.set_image(image)
    masks, iou, low_res = predictor.predict_torch(None, None, torch.zeros(0, 4))
    assert masks.shape == (0, 3, *image.shape[:2]) and iou.shape == (0, 3) and low_res.shape == (0, 3, 64, 64)


def test_a_folder_is_a_model_too(nano, nano_folder, packed_folder):
    assert not carsam.as_segment_anything(nano_folder).training
    assert type(carsam.SamPredictor(str(packed_folder)).model).__name__ == "SamModel"
    wrapped = carsam.as_segment_anything(nano)
    assert carsam.SamPredictor(wrapped).model is nano


def test_what_is_no_model(package):
    with pytest.raises(ValueError, match=r"torch\.save\(sam\.state_dict\(\)"):
        carsam.SamPredictor(meta_sam.small_sam())
    with pytest.raises(ValueError, match="a model is needed, not int"):
        carsam.as_segment_anything(3)
    with pytest.raises(carsam.errors.CarsamError, match="no-such-model"):
        carsam.as_segment_anything("no-such-model")
