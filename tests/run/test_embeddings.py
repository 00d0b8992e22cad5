"""Kept image embeddings: the same bits as without, another key for whatever decides them, damage, size, sharing."""

import copy
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from places import CALIBRATION_COCO, CALIBRATION_IMAGES, EVALUATION_COCO, EVALUATION_IMAGES, NANO
from safetensors.torch import load_file, save_file
from small_models import SMALL_MODELS

import carsam
from carsam.commands.quickstart import embedded_sample
from carsam.commands.showcase import showcase
from carsam.data.images.normalisation import named_normalisation, set_normalisation
from carsam.data.images.transforms import Preprocessor
from carsam.errors import ConfigError
from carsam.evaluate.points import evaluate_points
from carsam.models.forward import encode_image
from carsam.models.load import load_model
from carsam.run.comparison import Comparison, compare
from carsam.run.embeddings import Embeddings, embedding_key, encoder_fingerprint

LIMIT = 2


@pytest.fixture
def kept(tmp_path):
    return Embeddings(tmp_path / "embeddings")


def served(embeddings, model, pixels):
    with embeddings.serving(model):
        return encode_image(model, pixels)


def files(embeddings):
    return sorted(embeddings.folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", sorted(SMALL_MODELS))
def test_what_comes_back_is_what_the_encoder_gave(family, kept):
    model = SMALL_MODELS[family]()
    side = Preprocessor.for_model(model).image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    plain, first = encode_image(model, pixels), served(kept, model, pixels)
    again = served(Embeddings(kept.folder), model, pixels)
    for found in (first, again):
        assert torch.equal(found, plain) and found.stride() == plain.stride() and found.dtype == plain.dtype
    assert (kept.found, kept.computed) == (0, 1) and len(files(kept)) == 1
    assert (kept.folder / files(kept)[0].name).stat().st_size < plain.numel() * 4 + 1000


def test_scores_are_the_same_with_and_without(nano, kept):
    for evaluate in (carsam.evaluate_coco, evaluate_points):
        plain = evaluate(nano, EVALUATION_COCO, EVALUATION_IMAGES, limit=LIMIT)
        for _ in range(2):
            assert evaluate(nano, EVALUATION_COCO, EVALUATION_IMAGES, limit=LIMIT, embeddings=kept) == plain
    assert (kept.found, kept.computed) == (3 * LIMIT, LIMIT), "boxes and clicks share the images' embeddings"


@pytest.mark.parametrize("method", [None, "rtn"], ids=["units", "ranges"])
def test_packed_bytes_are_the_same_with_and_without(nano_folder, quick_config, tmp_path, method):
    config = replace(quick_config, decoder_only=True)
    if method is not None:  # sets ranges in one pass, without units
        config = replace(config, method=method, settings={})
    written = []
    kept = Embeddings(tmp_path / "embeddings")
    for number, embeddings in enumerate((Embeddings(gigabytes=0), kept, kept)):
        out = tmp_path / str(number)
        carsam.quantize(nano_folder, config.calibration.images, config, out=out, embeddings=embeddings)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
    assert (kept.found, kept.computed) == (3, 3)


def test_whatever_decides_an_embedding_is_in_its_key(nano, fresh_nano, packed_folder, pixel_values, monkeypatch):
    def key(model, pixels=pixel_values):
        return embedding_key(encoder_fingerprint(model), model, pixels)

    keys = [key(nano)]
    assert key(copy.deepcopy(nano)) == key(load_model(NANO)) == keys[0]
    with torch.no_grad():
        fresh_nano.mask_decoder.iou_token.weight.add_(1)
    assert key(fresh_nano) == keys[0], "the decoder has no part in it"

    with torch.no_grad():
        fresh_nano.vision_encoder.neck.layer_norm2.bias[0] += 1e-6
    keys += [key(fresh_nano), key(carsam.load(packed_folder)), key(nano, pixel_values.roll(1, -1))]
    attention = copy.deepcopy(nano)
    attention.config.vision_config._attn_implementation = "sdpa"
    keys.append(key(attention))
    other = copy.deepcopy(nano)
    other.config.vision_config.layer_norm_eps = 1e-5
    keys.append(key(other))
    keys.append(key(copy.deepcopy(nano).half()))
    threads = torch.get_num_threads()
    # Not set for real: MKL's LAPACK fails in a process whose number of threads was raised and lowered again.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 1)
        keys.append(key(nano))
    for name, other in (("versions", lambda: {"torch": "0"}), ("code_fingerprint", lambda **_: "other"), ("FORMAT", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(f"carsam.run.embeddings.{name}", other)
            keys.append(key(nano))
    assert len(set(keys)) == len(keys) == 11


def test_another_normalisation_is_another_embedding(nano, kept):
    for name in (None, "unit", "min-max"):
        model = copy.deepcopy(nano)
        if name is not None:
            set_normalisation(model, named_normalisation(name))
        plain = carsam.evaluate_coco(model, EVALUATION_COCO, EVALUATION_IMAGES, limit=1)
        assert carsam.evaluate_coco(model, EVALUATION_COCO, EVALUATION_IMAGES, limit=1, embeddings=kept) == plain
    assert (kept.found, kept.computed) == (0, 3)


def test_only_the_model_itself_is_served(nano, fresh_nano, kept, pixel_values):
    with kept.serving(nano):
        encode_image(fresh_nano, pixel_values)
        assert (kept.found, kept.computed) == (0, 0)
        encode_image(nano, pixel_values)
    encode_image(nano, pixel_values)
    assert (kept.found, kept.computed) == (0, 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "of another"])
def test_a_damaged_one_is_computed_again(damage, nano, kept, pixel_values, caplog):
    plain = served(kept, nano, pixel_values)
    (path,) = files(kept)
    whole = path.read_bytes()
    if damage == "of another":
        served(kept, nano, pixel_values.roll(1, -1))
        (other,) = [each for each in files(kept) if each != path]
        path.write_bytes(other.read_bytes())
    elif damage == "flipped":
        path.write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    else:
        path.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"no tensors"}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(served(kept, nano, pixel_values), plain)
    assert len(caplog.records) == 1 and "is damaged" in caplog.text and "is computed again" in caplog.text
    found = kept.found
    assert torch.equal(served(kept, nano, pixel_values), plain) and len(caplog.records) == 1
    assert kept.found == found + 1, "the damaged file was replaced"


def test_metadata_of_somebody_elses_is_no_embedding(nano, kept, pixel_values, caplog):
    served(kept, nano, pixel_values)
    (path,) = files(kept)
    save_file(load_file(path), path, metadata={"stride": "[1, 2, 3", "checksum": "0"})
    served(kept, nano, pixel_values)
    assert "its checksum differs" in caplog.text


def test_the_limit_drops_what_was_not_used_for_longest(nano, kept, pixel_values):
    images = [pixel_values.roll(shift, -1) for shift in range(5)]
    served(kept, nano, images[0])
    size = files(kept)[0].stat().st_size
    small = Embeddings(kept.folder, gigabytes=3.5 * size / 1e9)
    for moment, image in enumerate(images[1:3], start=1):
        served(small, nano, image)
        for path in files(kept):  # so far apart that no clock is too coarse
            if path.stat().st_mtime_ns > 10**18:
                os.utime(path, (moment, moment))
    # The first is used again: now the second is the oldest.
    assert torch.equal(served(small, nano, images[0]), encode_image(nano, images[0])) and small.found == 1
    served(small, nano, images[3])
    assert len(files(kept)) == 3
    for image, is_kept in ((images[0], True), (images[2], True), (images[3], True), (images[1], False)):
        fresh = Embeddings(kept.folder)
        served(fresh, nano, image)
        assert bool(fresh.found) == is_kept


def test_sizes(nano, pixel_values, tmp_path, monkeypatch):
    monkeypatch.setenv("CARSAM_EMBEDDINGS_GB", "0.5")
    assert Embeddings(tmp_path).limit == 500_000_000
    monkeypatch.delenv("CARSAM_EMBEDDINGS_GB")
    assert Embeddings(tmp_path).limit == 4_000_000_000
    for text in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("CARSAM_EMBEDDINGS_GB", text)
        with pytest.raises(ConfigError, match="CARSAM_EMBEDDINGS_GB must be a number of gigabytes from 0"):
            Embeddings(tmp_path)
    for gigabytes in (0, 1e-6):  # none at all, and fewer than one embedding takes
        nothing = Embeddings(tmp_path / "none", gigabytes)
        served(nothing, nano, pixel_values)
        assert not nothing.folder.exists()


def test_a_folder_that_cannot_be_written_to_is_told_once(nano, pixel_values, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    kept = Embeddings(tmp_path / "file" / "embeddings")
    for shift in range(2):
        image = pixel_values.roll(shift, -1)
        assert torch.equal(served(kept, nano, image), encode_image(nano, image))
    assert len(caplog.records) == 1 and "cannot be kept" in caplog.text


def test_two_processes_share_a_folder(nano, tmp_path):
    code = (
        "import carsam, sys\n"
        "from carsam.run.embeddings import Embeddings\n"
        "model, coco, images, folder = sys.argv[1:]\n"
        "kept = Embeddings(folder, 8e-4)\n"  # room for three of four images: they drop each other's
        "data, model = (coco, images), carsam.load_model(model)\n"
        "result = [carsam.evaluate_coco(model, *data, limit=4, embeddings=kept) for _ in range(2)]\n"
        "assert result[0] == result[1]\n"
        "print(repr(result[0].mean_iou))\n"
    )
    command = [sys.executable, "-c", code, str(NANO), str(EVALUATION_COCO), str(EVALUATION_IMAGES), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    pair = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    plain = carsam.evaluate_coco(nano, EVALUATION_COCO, EVALUATION_IMAGES, limit=4)
    assert outputs == [f"{plain.mean_iou!r}\n"] * 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing half-written stays"
    assert 1 <= len(list(tmp_path.iterdir())) <= 4


def test_a_comparison_encodes_each_image_once_for_a_float_encoder(tmp_path, cut_coco):
    rtn = {"method": "rtn", "settings": {"weight_observer": "min-max", "activation_observer": "min-max"}}
    rows = [
        {"name": "all", **rtn},
        {"name": "decoder", **rtn, "decoder_only": True},
        {"name": "finer", **rtn, "decoder_only": True, "overrides": {"*.probs": "w4a8"}},
    ]
    calibration = {"images": str(CALIBRATION_IMAGES), "coco": str(CALIBRATION_COCO), "n_images": 2}
    values = {"model": str(NANO), "calibration": calibration, "rows": rows, "coco": str(cut_coco)}
    values |= {"images": str(EVALUATION_IMAGES), "seeds": [0, 1]}
    kept = Embeddings(tmp_path / "embeddings")
    result = compare(Comparison.from_dict(values), tmp_path / "with", embeddings=kept)
    # The float model's two images, and those of the packed decoder-only models, whose encoder is the float one in FP16.
    # So are those of both rows' calibration images, which are other ones for every seed.
    calibrated = kept.computed - 4
    assert 2 <= calibrated <= 4 and kept.found == 3 * 2 + 2 * 2 * 2 - calibrated
    plain = compare(Comparison.from_dict(values), tmp_path / "without", embeddings=Embeddings(gigabytes=0))
    assert [m.scores for m in result.measurements] == [m.scores for m in plain.measurements]
    assert result.floating == plain.floating


@pytest.fixture
def cut_coco(tmp_path):
    """The evaluation's annotations of two images."""
    values = json.loads(EVALUATION_COCO.read_text())
    values["images"] = values["images"][:2]
    ids = {image["id"] for image in values["images"]}
    values["annotations"] = [each for each in values["annotations"] if each["image_id"] in ids]
    path = tmp_path / "two.json"
    path.write_text(json.dumps(values))
    return path


def test_a_showcase_that_goes_on_uses_them_and_says_no_time_then(quick_config, tmp_path, monkeypatch):
    monkeypatch.setenv("CARSAM_CACHE", str(tmp_path / "cache"))
    sample = embedded_sample()
    first = showcase(sample, tmp_path / "a", quick_config, limit=1, restart=False)
    assert first[0].evaluate_seconds > 0 and len(list((tmp_path / "cache" / "embeddings").iterdir())) >= 1
    again = showcase(sample, tmp_path / "a", quick_config, limit=1, restart=False)
    assert again[0].evaluate_seconds is None and again[1].evaluate_seconds > 0
    assert again[0].mean_iou == first[0].mean_iou
