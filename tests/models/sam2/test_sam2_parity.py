"""Meta's SAM 2 checkpoints against Meta's code, on weights that the ``sam2`` package drew."""

import pytest
import torch
from sam2_package import build, image_predictor
from transformers import Sam2Model, Sam2VideoModel

from carsam.errors import CheckpointError
from carsam.models.forward import encode_image, predict_logits
from carsam.models.load import load_model
from carsam.models.sam2.meta import META_POINTS, infer_config, sam2_from_meta, state_dict_to_meta
from carsam.models.sam2.random import sam2_config
from carsam.models.sam2.sizes import ARCHITECTURES
from carsam.models.skeleton import skeleton

# A quarter of the published side: windows of 14 are padded, as at 1024 px.
SIDE, SIZE = 256, (90, 120)
# (configuration, SAM 2.1); one of each width of the first stage that has a table entry of its own.
TINY, BASE = "sam2.1/sam2.1_hiera_t", "sam2/sam2_hiera_b+"


@pytest.fixture(scope="module")
def meta():
    return build(TINY, SIDE)


@pytest.fixture(scope="module")
def ours(meta, tmp_path_factory):
    path = tmp_path_factory.mktemp("meta") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": meta.state_dict()}, path)
    return load_model(path, image_size=SIDE)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def predictor(meta, pixels):
    return image_predictor(meta, pixels, SIZE)


BOXES = torch.tensor([[20.0, 30, 180, 200], [5, 60, 70, 90]])
POINTS, LABELS = torch.tensor([[[40.0, 50], [200, 90]], [[30, 80], [60, 70]]]), torch.tensor([[1, 0], [1, 1]])
PROMPTS = {
    "boxes": {"boxes": BOXES},
    "points": {"points": POINTS, "labels": LABELS},
    "both": {"boxes": BOXES, "points": POINTS, "labels": LABELS},
    "mask": {"masks": torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))},
    "boxes and masks": {"boxes": BOXES, "masks": torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(2))},
}


def close(ours, theirs):
    """Within 1e-4 of the largest: both compute in float32, in other orders."""
    torch.testing.assert_close(ours, theirs, atol=1e-4 * max(1.0, theirs.abs().max().item()), rtol=0)


@pytest.mark.parametrize("several", [False, True], ids=["one", "three"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@torch.no_grad()
def test_masks_are_those_of_metas_predictor(ours, predictor, pixels, prompts, several):
    masks, iou, _ = predictor._predict(
        prompts.get("points"),
        prompts.get("labels"),
        prompts.get("boxes"),
        prompts.get("masks"),
        multimask_output=several,
        return_logits=True,
    )
    logits, scores = predict_logits(ours, encode_image(ours, pixels), **prompts, multimask_output=several)
    close(torch.nn.functional.interpolate(logits, SIZE, mode="bilinear", align_corners=False), masks)
    close(scores, iou)
    assert masks.std() > 0.01


@torch.no_grad()
def test_embedding_is_metas(ours, predictor, pixels):
    from carsam.models.sam2.encoder import fold, unfold

    embedding = encode_image(ours, pixels)
    *finer, coarse = unfold(embedding)
    assert torch.equal(fold([*finer, coarse]), embedding)
    close(coarse + ours.no_memory_embedding.view(1, -1, 1, 1), predictor.get_image_embedding())
    for mine, theirs in zip(finer, predictor._features["high_res_feats"]):
        close(mine, theirs)


def test_every_tensor_has_its_place(meta, ours):
    """Memory included; there and back."""
    assert type(ours) is Sam2VideoModel and not ours.training
    state, back = meta.state_dict(), state_dict_to_meta(ours)
    assert state.keys() == back.keys()
    assert all(torch.equal(value, back[name]) for name, value in state.items())
    assert all(not buffer.is_meta for buffer in ours.buffers())


@pytest.mark.slow
@torch.no_grad()
def test_sam_2_0_of_another_width(pixels):
    meta = build(BASE, SIDE)
    ours = sam2_from_meta(meta.state_dict(), "the model", SIDE).eval()
    assert ours.occlusion_spatial_embedding_parameter is None
    masks, _, _ = image_predictor(meta, pixels, SIZE)._predict(None, None, BOXES, return_logits=True)
    logits, _ = predict_logits(ours, encode_image(ours, pixels), boxes=BOXES, multimask_output=True)
    close(torch.nn.functional.interpolate(logits, SIZE, mode="bilinear", align_corners=False), masks)


def test_without_memory_it_is_an_image_model(meta):
    state = {k: v for k, v in meta.state_dict().items() if k.startswith(("image_encoder", "sam_", "no_mem_embed"))}
    assert type(sam2_from_meta(state, "the model", SIDE)) is Sam2Model


QKV = "image_encoder.trunk.blocks.3.attn.qkv.weight"
NOT_SAM2 = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != QKV}, f"{QKV} missing"),
    "shape": (lambda s: {**s, QKV: s[QKV][:5]}, r"does not fit together: .*qkv\.weight \(5, "),
    "integers": (lambda s: {**s, QKV: s[QKV].to(torch.int8)}, r"qkv\.weight in torch\.int8"),
    "point": (lambda s: {**s, META_POINTS.format(1): torch.zeros(2, 256)}, r"point_embeddings\.1\.weight \(2, 256\)"),
    "left over": (lambda s: {**s, "adapter.weight": torch.zeros(1)}, "tensors that SAM 2 does not: adapter"),
    "empty": (lambda s: {**s, QKV: torch.zeros(0, 3)}, "is empty"),
    "another width": (
        lambda s: {**s, "image_encoder.trunk.patch_embed.proj.weight": torch.zeros(40, 3, 7, 7)},
        "40 channels with 1-2-7-2 blocks, which is none of the published",
    ),
    "blocks": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("image_encoder.trunk.blocks.8.")},
        "none of the published",
    ),
}


@pytest.mark.parametrize(("make", "message"), NOT_SAM2.values(), ids=NOT_SAM2)
def test_not_a_sam_2(meta, make, message):
    with pytest.raises(CheckpointError, match=message):
        sam2_from_meta(make(meta.state_dict()), "the file", SIDE)


@pytest.mark.parametrize("size", [250, 0, 4096])
def test_impossible_image_sizes(meta, size):
    with pytest.raises(CheckpointError, match=f"cannot take images of {size} pixels"):
        sam2_from_meta(meta.state_dict(), "the file", size)


@pytest.mark.parametrize(("size", "known"), ARCHITECTURES.items())
@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_published_sizes_are_read_from_shapes(size, known, version):
    """Without weights: a state of the shapes of each published model gives its configuration back."""
    config = sam2_config(size, 1024, video=True, version=version)
    found = infer_config(state_dict_to_meta(skeleton(Sam2VideoModel, config)))
    assert found.to_dict() == config.to_dict()
    assert found.vision_config.backbone_config.blocks_per_stage == list(known.blocks)
