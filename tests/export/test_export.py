"""Whole models: files, names and shapes of every profile, masks, metadata, and what is refused."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from tinyvit_state import SIDES, SMALL

from carsam.errors import CarsamError, CheckpointError, ConfigError
from carsam.export.check import check_share, prove
from carsam.export.export import REPORT, describe, export, write
from carsam.export.profile import profiles
from carsam.export.requirements import require_onnx, require_runtime
from carsam.export.trace import trace
from carsam.models.family import family_of
from carsam.models.forward import encode_image, predict_logits
from carsam.models.tinyvit.random import random_tinyvit
from carsam.pack.checkpoint import load

SIZES = {"masks": (1, 1, "height", "width"), "iou_predictions": (1, 1), "low_res_masks": (1, 1, 256, 256)}
DECODER = {
    "image_embeddings": (1, 256, 16, 16),
    "point_coords": (1, "num_points", 2),
    "point_labels": (1, "num_points"),
    "mask_input": (1, 1, 256, 256),
    "has_mask_input": (1,),
    "orig_im_size": (2,),
}
PIXELS = ({"input_image": ("height", "width", 3)}, {"image_embeddings": (1, 256, 16, 16)})
NORMALISED = ({"x": (1, 3, 256, 256)}, {"image_embeddings": (1, 256, 16, 16)})


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


def described(tensors):
    return {each.name: tuple(each.shape) for each in tensors}


@pytest.fixture(scope="module")
def pair(packed_folder, tmp_path_factory):
    """The profile onnx of the packed model."""
    folder = tmp_path_factory.mktemp("export") / "pair"
    return export(packed_folder, folder), folder


@pytest.fixture(scope="module")
def traced(packed_folder):
    """The packed model's description and its graphs, for every profile."""
    model = load(packed_folder)
    return describe(packed_folder, model, family_of(model), "any"), trace(model, family_of(model))


def test_masks_are_those_of_the_simulated_model(pair, packed_folder, pixel_values):
    _, folder = pair
    encoder, decoder = session(folder / "encoder.onnx"), session(folder / "decoder.onnx")
    model = load(packed_folder)
    expected = encode_image(model, pixel_values)
    (found,) = encoder.run(None, {"pixel_values": pixel_values.numpy()})
    # A code that lies half way between two may fall to the other side, by the last bit of a sum, and moves what
    # follows.
    assert np.abs(found - expected.numpy()).mean() < 0.01 * expected.abs().mean()
    boxes = torch.tensor([[20.0, 30.0, 120.0, 140.0], [5.0, 5.0, 250.0, 200.0]])
    logits, iou = predict_logits(model, expected, boxes=boxes, multimask_output=True)
    inputs = {
        "image_embeddings": expected.numpy(),
        "point_coords": boxes.reshape(2, 2, 2).numpy(),
        "point_labels": np.array([[2, 3]] * 2, np.float32),
        "mask_input": np.zeros((1, 1, 64, 64), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([200, 320], np.float32),
    }
    masks, scores, low_res = decoder.run(None, inputs)
    assert masks.shape == (2, 4, 200, 320)
    np.testing.assert_allclose(low_res[:, 1:], logits.numpy(), atol=1e-3)
    np.testing.assert_allclose(scores[:, 1:], iou.numpy(), atol=1e-4)


def test_all_layers_run_in_integers_and_the_files_say_what_they_are(pair, packed_folder):
    result, folder = pair
    assert result.share() == result.share("attention") == 1
    proofs = [prove(folder / name) for name in ("encoder.onnx", "decoder.onnx")]
    assert all(proof.share == 1 and proof.floating == 0 and not proof.missing for proof in proofs)
    assert all(proof.attention_integer > 0 and proof.attention_floating == 0 for proof in proofs)
    check_share(proofs)
    properties = {each.key: each.value for each in onnx.load(folder / "encoder.onnx").metadata_props}
    assert properties["carsam.bits"] == "w4a4" and properties["carsam.method"] == "car-sam"
    assert properties["carsam.source"] == "sam-nano-256" and properties["carsam.version"]
    listed = json.loads((folder / REPORT).read_text())
    assert listed["profile"] == "onnx" and set(listed["files"]) == {"encoder.onnx", "decoder.onnx"}
    # 4-bit weights lie packed: the packed folder and its graph weigh the same but for the graph.
    ours = sum((folder / name).stat().st_size for name in listed["files"])
    assert ours < 1.2 * (packed_folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("profile", "encoder", "decoder", "files"),
    [
        ("samexporter", PIXELS, (DECODER, SIZES), {"nano-w4a4.encoder.onnx", "nano-w4a4.decoder.onnx"}),
        (
            "x-anylabeling",
            PIXELS,
            (DECODER, SIZES),
            {"nano-w4a4.encoder.onnx", "nano-w4a4.decoder.onnx", "nano-w4a4.yaml"},
        ),
        ("osam", NORMALISED, (DECODER, SIZES), {"nano-w4a4.encoder.onnx", "nano-w4a4.decoder.onnx"}),
        (
            "transformers.js",
            (
                {"pixel_values": (1, 3, 256, 256)},
                {"image_embeddings": (1, 256, 16, 16), "image_positional_embeddings": (1, 256, 16, 16)},
            ),
            (
                {
                    "input_points": (1, "point_batch_size", "nb_points_per_image", 2),
                    "input_labels": (1, "point_batch_size", "nb_points_per_image"),
                    "image_embeddings": (1, 256, 16, 16),
                    "image_positional_embeddings": (1, 256, 16, 16),
                },
                {
                    "iou_scores": (1, "point_batch_size", 3),
                    "pred_masks": (1, "point_batch_size", 3, 64, 64),
                },
            ),
            {
                "onnx/vision_encoder_q4.onnx",
                "onnx/prompt_encoder_mask_decoder_q4.onnx",
                "config.json",
                "preprocessor_config.json",
            },
        ),
    ],
)
def test_names_and_shapes_are_the_tools_own(profile, encoder, decoder, files, traced, tmp_path):
    result = write(tmp_path / "out", profiles()[profile], *traced)
    assert set(result.files) == files
    graphs = sorted((name for name in files if name.endswith(".onnx")), key=lambda name: "decoder" in name)
    for name, (inputs, outputs) in zip(graphs, (encoder, decoder)):
        found = session(tmp_path / "out" / name)
        assert described(found.get_inputs()) == inputs
        assert described(found.get_outputs()) == outputs
    if profile == "x-anylabeling":
        text = yaml.safe_load((tmp_path / "out" / "nano-w4a4.yaml").read_text())
        assert text["type"] == "segment_anything" and text["encoder_model_path"] == "nano-w4a4.encoder.onnx"
        assert {"name", "display_name", "decoder_model_path"} <= set(text)


def test_a_float_model_is_exported_as_it_is(nano_folder, nano, pixel_values, tmp_path):
    export(nano_folder, tmp_path / "out")
    (found,) = session(tmp_path / "out" / "encoder.onnx").run(None, {"pixel_values": pixel_values.numpy()})
    np.testing.assert_allclose(found, encode_image(nano, pixel_values).numpy(), atol=1e-4)
    proof = prove(tmp_path / "out" / "encoder.onnx")
    assert proof.macs == 0 and proof.share == 1


def test_profiles_are_found():
    assert set(profiles()) == {"onnx", "openvino", "osam", "samexporter", "transformers.js", "x-anylabeling"}


def test_what_cannot_be_exported_is_refused(packed_folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no export profile 'tflite'; there are onnx, openvino"):
        export(packed_folder, tmp_path / "out", "tflite")
    with pytest.raises(CarsamError, match="is or holds the model"):
        export(packed_folder, packed_folder, overwrite=True)
    with pytest.raises(CheckpointError):
        export(tmp_path / "nothing", tmp_path / "out")
    random_tinyvit("mobilesam", SIDES["mobilesam"], **SMALL).save_pretrained(tmp_path / "tiny")
    with pytest.raises(ConfigError, match=r"transformers\.js has no model for the family tinyvit"):
        export(tmp_path / "tiny", tmp_path / "out", "transformers.js")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(onnxruntime, "__version__", "1.9.0")
    with pytest.raises(ConfigError, match=r"ONNX Runtime 1\.9\.0 is too old .* pip install -U"):
        require_runtime()
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"onnx is not installed .*carsam\[onnx\]"):
        require_onnx()


def test_a_packed_folder_of_another_version_is_refused(packed_folder, tmp_path):
    import shutil

    from carsam.pack.folder import CHECKSUMS, checksums_text

    later = tmp_path / "later"
    shutil.copytree(packed_folder, later)
    config = json.loads((later / "config.json").read_text())
    config["quantization_config"]["format"] += 1
    (later / "config.json").write_text(json.dumps(config))
    (later / CHECKSUMS).write_text(checksums_text(later))
    with pytest.raises(CheckpointError, match=r"has format .* install the carsam that wrote it"):
        export(later, tmp_path / "out")


def test_only_an_earlier_export_is_overwritten(nano_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CarsamError, match="exists already"):
        export(nano_folder, out)
    with pytest.raises(CarsamError, match="was not written by carsam export"):
        export(nano_folder, out, overwrite=True)
    (out / REPORT).write_text('{"files": {}}')
    with pytest.raises(CarsamError, match=r"did not write, so it is not overwritten: notes\.txt"):
        export(nano_folder, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_too_little_in_integers_fails(pair, tmp_path):
    """A file whose layers were put back into floating point by hand."""
    _, folder = pair
    model = onnx.load(folder / "decoder.onnx")
    sites = {each.key: each.value for each in model.metadata_props}
    facts = json.loads(sites["carsam.sites"])
    for site in facts:
        site["macs"] *= 2
    onnx.helper.set_model_props(model, {**sites, "carsam.sites": json.dumps(facts)})
    onnx.save(model, tmp_path / "decoder.onnx")
    proof = prove(tmp_path / "decoder.onnx")
    assert proof.share == 0.5
    with pytest.raises(ConfigError, match=r"only 50\.0 % of the quantized layers"):
        check_share([proof])
    with pytest.raises(CheckpointError, match="was not written by this version"):
        onnx.helper.set_model_props(model, {})
        onnx.save(model, tmp_path / "decoder.onnx")
        prove(tmp_path / "decoder.onnx")
