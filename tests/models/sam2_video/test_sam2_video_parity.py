"""Objects followed as Meta's ``SAM2VideoPredictor`` follows them, on weights that the ``sam2`` package drew."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from sam2_package import build, sam2_module

from carsam.models.load import load_model
from carsam.predict.video import SamVideoPredictor

SIDE, SIZE, FRAMES = 128, (96, 128), 5
# What `build_sam2_video_predictor` sets, without the filling of small holes, which needs its CUDA kernel.
SETTINGS = {"binarize_mask_from_pts_for_mem_enc": True, "fill_hole_area": 0}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Meta's predictor, and carsam's with the same weights."""
    target = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    meta = build("sam2.1/sam2.1_hiera_t", SIDE, target=target, **SETTINGS)
    path = tmp_path_factory.mktemp("meta") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": meta.state_dict()}, path)
    return meta, SamVideoPredictor(load_model(path, image_size=SIDE))


@pytest.fixture(scope="module")
def clip():
    base = np.random.default_rng(3).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    base = np.array(Image.fromarray(base).resize(SIZE[::-1], Image.Resampling.BILINEAR))
    return [np.roll(base, (2 * index, 3 * index), (0, 1)) for index in range(FRAMES)]


def theirs(meta, predictor, clip, prompt):
    """Mask logits at the video's size, frame by frame, of Meta's predictor on carsam's pixels."""
    pixels = torch.cat([predictor.preprocessor(image)[0] for image in clip])
    module = sam2_module("sam2.sam2_video_predictor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_video_frames", lambda **_: (pixels, *SIZE))
        state = meta.init_state("")
    prompt(meta, state)
    return [logits.clone() for _, _, logits in meta.propagate_in_video(state)]


def ours(predictor, clip, prompt):
    state = predictor.init_state(clip)
    prompt(predictor, state)
    return [logits for _, _, logits in predictor.propagate_in_video(state)]


MASK = np.zeros(SIZE, bool)
MASK[20:60, 30:90] = True
PROMPTS = {
    "box": lambda p, s: p.add_new_points_or_box(s, 0, 1, box=np.array([30.0, 20, 90, 60])),
    "points": lambda p, s: p.add_new_points_or_box(s, 0, 1, np.array([[60.0, 40], [8, 8]]), np.array([1, 0])),
    "mask": lambda p, s: p.add_new_mask(s, 0, 1, MASK),
}


@pytest.mark.parametrize(("kind", "seen"), [("box", True), ("points", True), ("mask", True), ("box", False)])
@torch.no_grad()
def test_masks_over_a_video(both, clip, kind, seen):
    """Within 1e-5: both compute in float32, in other orders, and keep memory in bfloat16.

    A mask prompt is within 1e-3: transformers writes it into memory as it is, Meta's code after a trip through the
    decoder's quarter resolution, so its border differs by a pixel.
    """
    meta, predictor = both
    # Drawn weights call every object hidden; a bias decides.
    for head in (meta.sam_mask_decoder.pred_obj_score_head, predictor.model.mask_decoder.pred_obj_score_head):
        last = head.layers[-1] if head is meta.sam_mask_decoder.pred_obj_score_head else head.proj_out
        last.bias.fill_(5.0 if seen else -5.0)
    want, got = theirs(meta, predictor, clip, PROMPTS[kind]), ours(predictor, clip, PROMPTS[kind])
    assert len(want) == len(got) == FRAMES
    assert all((logits > 0).any() and (logits < 0).any() for logits in want) == seen
    for mine, other in zip(got, want):
        torch.testing.assert_close(mine, other, atol=1e-3 if kind == "mask" else 1e-5, rtol=0)
    assert (want[2] - want[3]).abs().max() > 1e-2 or not seen  # the clip moves, and so does the answer


@pytest.mark.parametrize(
    "name", ["init_state", "add_new_points_or_box", "add_new_mask", "propagate_in_video", "reset_state"]
)
def test_methods_take_what_metas_take(name):
    """The same arguments in the same order, with the same defaults: code written for sam2 runs as it is."""
    meta = sam2_module("sam2.sam2_video_predictor").SAM2VideoPredictor
    want, got = (
        [(each.name, each.default) for each in inspect.signature(getattr(owner, name)).parameters.values()]
        for owner in (meta, SamVideoPredictor)
    )
    assert got == want
