"""Clips for calibration: stills that move, real videos, and what a model with a memory makes of both."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_model

import carsam
from carsam.config import QuantizeConfig
from carsam.data.video.masks import write_mask
from carsam.errors import ConfigError, DataError
from carsam.models.family import find_sites
from carsam.models.sam2_video.clips import moving_still
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.clips import AGES, FRAMES, PromptedClip, as_clips, clip_set
from carsam.prompts.image import PromptedImage


@pytest.fixture(scope="module")
def model():
    return small_model("sam2_video")


@pytest.fixture(scope="module")
def stills():
    generator = torch.Generator().manual_seed(0)
    images = []
    for index in range(4):
        noise = torch.randn(1, 3, 8, 8, generator=generator)
        pixels = torch.nn.functional.interpolate(noise, (128, 128), mode="bilinear")
        images.append(PromptedImage(str(index), pixels, torch.tensor([[10.0, 20, 90, 80], [60, 60, 120, 100]])))
    return CalibrationSet.of(images)


def test_a_still_moves_smoothly_and_the_same_way_each_time(stills):
    image = stills.images[0].pixel_values
    clip = moving_still(image, 3, 8)
    assert clip.shape == (8, 3, 128, 128) and torch.equal(clip[:1], image)
    assert torch.equal(clip, moving_still(image, 3, 8))
    assert not torch.equal(clip[1:], moving_still(image, 4, 8)[1:])
    away = [(frame - clip[0]).square().mean().item() for frame in clip]
    steps = [(b - a).square().mean().item() for a, b in itertools.pairwise(clip)]
    assert away[7] > 4 * away[1] > 0  # it goes somewhere, step by step
    assert max(steps) < 0.6 * away[7]
    assert clip.abs().max() <= image.abs().max() + 1e-5  # nothing but the picture


def test_a_set_becomes_clips_of_all_ages(stills, model):
    data = find_sites(model).family.calibration_data(model, stills)
    assert [clip.age for clip in data.images] == list(AGES)
    assert [clip.tracked for clip in data.images] == [True, True, True, False]
    assert all(len(clip.frames) == FRAMES for clip in data.images)
    assert data.fingerprint != stills.fingerprint
    assert find_sites(model).family.calibration_data(model, data) is data
    moved = replace(data.images[0], frames=data.images[0].frames + 1)
    assert CalibrationSet.of([moved, *data.images[1:]]).fingerprint != data.fingerprint


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for name in ("a", "b"):
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / name).mkdir(parents=True)
        for index in range(20):
            pixels = np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "JPEGImages" / name / f"{index:05d}.png")
            mask = np.zeros((48, 64), np.uint8)
            mask[4:20, 2 + index : 22 + index], mask[30:40, 30:60] = 1, 2
            write_mask(root / "Annotations" / name / f"{index:05d}.png", mask)
    return root


def test_clips_of_real_videos(videos, model):
    data = clip_set(model, videos, n_clips=3, frames=4, step=2, seed=1)
    assert [clip.name.split("/")[0] for clip in data.images] == ["a", "b", "a"]
    assert data.fingerprint == clip_set(model, videos, n_clips=3, frames=4, step=2, seed=1).fingerprint
    clip = data.images[0]
    start = int(clip.name.split("/")[1])
    assert isinstance(clip, PromptedClip) and clip.frames.shape == (4, 3, 128, 128) and start <= 13
    assert torch.equal(clip.frames[:1], clip.pixel_values)
    # The first object's mask and box, stretched from 64 × 48 to 128 × 128.
    assert clip.boxes[0].tolist() == pytest.approx([2 * (2 + start), 4 * 128 / 48, 2 * (22 + start), 20 * 128 / 48])
    assert clip.masks[0].sum().item() == pytest.approx(16 * 20 * 2 * 128 / 48, rel=0.05)
    with pytest.raises(ConfigError, match="at least 2 frames"):
        clip_set(model, videos, frames=1)


def test_a_data_set_of_videos_calibrates_a_model_with_a_memory(videos, model):
    config = QuantizeConfig("rtn", {"weight_observer": "min-max", "activation_observer": "min-max"}, "w4a4")
    config = replace(config, calibration=replace(config.calibration, n_images=2))
    result = carsam.quantize(model, videos, config)
    assert result.recipe["calibration_fingerprint"] == clip_set(model, videos, n_clips=2).fingerprint
    with pytest.raises(DataError, match="holds no images"):
        carsam.quantize(small_model("sam2"), videos, config)


@torch.no_grad()
def test_memory_parts_read_what_the_clip_gives(stills, videos, model):
    """Rows of a part's inputs: frames and objects; maps of the memory by age; two objects at most."""
    sites = find_sites(model)
    parts = {part.name: part for part in sites.family.parts(sites)}
    assert list(parts) == ["encoder", "memory_encoder", "memory_attention", "decoder"]
    data = sites.family.calibration_data(model, stills)
    size = model.memory_attention.position_ids.shape[0]
    for clip, maps in zip(data.images[:2], (7, 1)):
        written = parts["memory_encoder"].enter(model, {}, clip)
        assert written["features"].shape[0] == written["masks"].shape[0] == {7: 8, 1: 4}[maps]  # every second call
        read = parts["memory_attention"].enter(model, {}, clip)
        # An object pointer is four tokens; there is one for every map at most.
        assert read["pointers"].shape == (2, 4 * maps)
        assert read["keys"].shape == (2, 1, maps * size + 4 * maps, 64)
        decoded = parts["decoder"].enter(model, {}, clip)
        assert decoded["queries"].shape[0] == {7: 8, 1: 2}[maps]  # eight rows at most, none of the prompted frame
        assert decoded["queries"].shape[2] == 8  # six tokens of its own, two for "no point"
    with_boxes = parts["decoder"].enter(model, {}, data.images[3])
    assert with_boxes["queries"].shape[:3] == (2, 1, 9)  # both boxes of the image, three tokens each


@torch.no_grad()
def test_the_memory_bank_is_the_quantized_models(stills, model):
    """What memory attention reads during calibration changes with the part that wrote it."""
    sites = find_sites(model)
    part = next(part for part in sites.family.parts(sites) if part.name == "memory_attention")
    clip = sites.family.calibration_data(model, stills).images[0]
    before = part.enter(model, {}, clip)["keys"]
    writer = model.memory_encoder.feature_projection
    kept = writer.weight.clone()
    try:
        writer.weight.mul_(1.5)
        after = part.enter(model, {}, clip)["keys"]
    finally:
        writer.weight.copy_(kept)
    assert not torch.allclose(before, after)
    assert torch.equal(part.enter(model, {}, clip)["keys"], before)


def test_clips_stay_clips(stills):
    with_clips = as_clips(stills, moving_still, 3)
    assert as_clips(with_clips, moving_still, 5) is with_clips
