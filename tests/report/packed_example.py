"""A packed folder with a diagnosis, made by hand: plausible numbers, small pictures, no model."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

DECODER = "mask_decoder.transformer"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
OPERANDS = ("query", "key", "value", "probs")
STAGES = [
    f"layers.{i}.{part}"
    for i in (0, 1)
    for part in ("self_attn", "cross_attn_token_to_image", "mlp", "cross_attn_image_to_token")
] + ["final_attn_token_to_image"]


def layers_and_attentions(n_blocks: int) -> tuple[list[str], list[str]]:
    """Names in execution order."""
    layers, attentions = [], []
    for i in range(n_blocks):
        block = f"vision_encoder.layers.{i}"
        layers += [f"{block}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")]
        attentions.append(f"{block}.attn")
    layers += ["vision_encoder.neck.conv1", "vision_encoder.neck.conv2"]
    for stage in STAGES:
        if stage.endswith("mlp"):
            layers += [f"{DECODER}.{stage}.lin1", f"{DECODER}.{stage}.lin2"]
        else:
            layers += [f"{DECODER}.{stage}.{part}" for part in PROJECTIONS]
            attentions.append(f"{DECODER}.{stage}")
    return layers, attentions


def write_packed(folder: Path, *, n_blocks: int = 3, bits: int = 4) -> Path:
    """``config.json``, ``recipe.yaml`` and a weights file of the right form (its tensors hold nothing)."""
    folder.mkdir(parents=True, exist_ok=True)
    layers, attentions = layers_and_attentions(n_blocks)
    grid = {"grid": "uniform", "bits": bits}
    layout: dict[str, Any] = {
        "layers": {
            # One layer with other bits, and one in floating point.
            name: {"weight": 8 if "neck" in name else 16 if name.endswith("layers.1.mlp.lin1") else bits, "input": grid}
            for name in sorted(layers)
        },
        "attentions": {
            name: {which: {"grid": "log2", "bits": bits, "tau": 2} if which == "probs" else grid for which in OPERANDS}
            for name in sorted(attentions)
        },
    }
    packing = {"quant_method": "carsam", "method": "car-sam", "bits": f"w{bits}a{bits}", "carsam_version": "0.1.0"}
    config = {"model_type": "sam", "quantization_config": {**packing, "format": 1, "layout": layout}}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = {
        "carsam_version": "0.1.0",
        "model": "models/sam <b>&amp; co",
        "method": "car-sam",
        "settings": {"granularity": "pair"},
        "bits": f"w{bits}a{bits}",
        "overrides": {"*.neck.*": "w8a8"},
        "calibration": {"images": "photos", "n_images": 32},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    _write_weights(folder / "model.safetensors", layout["layers"])
    return folder


def _write_weights(path: Path, layers: dict[str, Any]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0

    def add(name: str, dtype: str, shape: list[int], size: int) -> None:
        nonlocal end
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size

    for name, spec in layers.items():
        if spec["weight"] <= 8:
            count = 32 * 64 * spec["weight"] // 8
            add(f"{name}.weight", "U8", [count], count)
            add(f"{name}.weight_scale", "F32", [32], 128)
        else:
            add(f"{name}.weight", "F16", [32, 64], 4096)
        add(f"{name}.bias", "F16", [32], 64)
        add(f"{name}.input_quantizer.scale", "F32", [], 4)
    add("mask_decoder.iou_token.weight", "F16", [1, 256], 512)
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)


def write_results(folder: Path, *, n_blocks: int = 3, n_images: int = 40) -> None:
    """``results.json`` with everything that can be in it."""
    rng = random.Random(1)
    units = [f"vision_encoder.layers.{i}" for i in range(n_blocks)] + ["vision_encoder.neck"]
    units += [f"{DECODER}.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "pair")]
    units += [f"{DECODER}.final_attn_token_to_image"]
    quantization = {
        "seconds": 312.4,
        "peak_memory_bytes": 1_400_000_000,
        "skipped_images": 1,
        "units": [_unit(name, rng) for name in units],
        "compensations": [
            {"attention": f"{DECODER}.{stage}", "scores": [0.02, 0.01], "output": [0.1, 0.09], "change": {"key": 0.05}}
            for stage in STAGES
            if not stage.endswith("mlp")
        ]
        + [
            {
                "layer": f"{DECODER}.layers.0.self_attn.q_proj",
                "condition": [1373.4, 4.1],
                "error": [0.0024, 0.0168],
                "change": 0.31,
            },
            {
                "refitted": f"{DECODER}.layers.0.self_attn.v_proj",
                "kind": "weights",
                "damping": 0.1,
                "change": 0.123,
                "error": [0.051, 0.042],
                "rounded": [0.066, 0.0456],
                "gain": 1.27,
            },
        ],
        "transforms": [{"transform": "BIG", "attention": f"{DECODER}.{STAGES[0]}", "modes": 2, "flipped_channels": 61}],
    }
    names = [f"{i:012d}.jpg" for i in range(n_images)]
    images = [{"name": name, "mean_iou": rng.uniform(5, 90), "ious": [40.0, 50.0, 60.5]} for name in names]
    images.append({"name": "empty.jpg", "mean_iou": None, "ious": []})
    scores = {"segm_ap": 39.3, "box_ap": 52.04, "mean_iou": 61.2, "n_images": n_images + 1, "n_prompts": 3 * n_images}
    evaluation = {
        "coco": "data/instances <val>.json",
        "images": "data/val",
        "boxes": None,
        "limit": None,
        **scores,
        "points": {"mean_iou": {"1": 40.5, "3": 47.0, "5": 50.25}},
        "per_image": images,
    }
    better = [{**image, "ious": [iou + rng.uniform(-5, 20) for iou in image["ious"]]} for image in images]
    better[7]["ious"] = [90.0, 50.5, 20.0] if n_images > 7 else better[7]["ious"]
    floating = {**scores, "segm_ap": 55.8, "box_ap": 60.6, "mean_iou": 70.9, "per_image": better}
    results = {"quantization": quantization, "evaluation": evaluation, "float_evaluation": floating}
    (folder / "results.json").write_text(json.dumps(results))


def _unit(name: str, rng: random.Random) -> dict[str, Any]:
    before = [rng.uniform(0.01, 0.2) for _ in range(2 if name.endswith("pair") else 1)]
    losses = [[step, 3 * math.exp(-step / 150) + rng.uniform(0.2, 1.5)] for step in range(0, 300, 2)]
    after = [0.6 * error for error in before]
    return {"unit": name, "steps": 300, "seconds": 21.5, "losses": losses, "before": before, "after": after}


def write_diagnosis(
    folder: Path, *, n_blocks: int = 3, n_heads: int = 4, picture_side: int = 96, n_maps: int = 10
) -> dict[str, Any]:
    """``diagnosis`` with its pictures; returns what ``diagnosis.json`` holds."""
    rng = random.Random(2)
    layers, attentions = layers_and_attentions(n_blocks)
    target = folder / "diagnosis"
    for name in ("heat", "examples"):
        (target / name).mkdir(parents=True, exist_ok=True)
    sites = [f"{name}.input" for name in layers] + [f"{name}.{which}" for name in attentions for which in OPERANDS]
    diagnosis = {
        "format": 1,
        "float": "models/sam",
        "quantized": folder.name,
        "method": "car-sam",
        "bits": "w4a4",
        "n_images": 8,
        "n_prompts": 31,
        "reference": "ground truth",
        "mean_iou_float": 0.709,
        "mean_iou_quantized": 0.612,
        "attentions": [_attention(name, n_heads, rng) for name in attentions],
        "heat_maps": [_heat_map(target, index, picture_side, rng) for index in range(n_maps)],
        "oscillation": _oscillation(rng),
        "units": [],
        "sites": [_site(name, rng) for name in sites],
        "weights": [
            {"site": name, "bits": 4, "parameters": 2048, "error": None if "proj" in name else rng.uniform(1e-3, 1e-2)}
            for name in layers
        ],
        "sensitivity": [
            {"site": name, "kind": kind, "bits": 4, "error": 10 ** rng.uniform(-7, -1), "iou": rng.uniform(0.6, 1)}
            for names, kind in ((layers, "weight"), (sites, "activation"))
            for name in names
        ],
        "examples": [_example(target, role, picture_side, rng) for role in ("worst", "median")],
    }
    save_diagnosis(folder, diagnosis)
    return diagnosis


def save_diagnosis(folder: Path, diagnosis: dict[str, Any]) -> None:
    """Writes ``diagnosis.json``; NaN and infinite values as JSON has no form for them, but Python reads."""
    (folder / "diagnosis").mkdir(exist_ok=True)
    (folder / "diagnosis" / "diagnosis.json").write_text(json.dumps(diagnosis))


def _attention(name: str, n_heads: int, rng: random.Random) -> dict[str, Any]:
    def measures() -> dict[str, float]:
        entropy, change = rng.uniform(2, 6), rng.uniform(-0.5, 1.5)
        values = {"entropy_float": entropy, "entropy_quantized": entropy + change, "entropy_change": change}
        values |= {"kl": rng.uniform(0, 2), "focus_overlap": rng.uniform(0.1, 1)}
        return {**values, "row_sum": 0.97, "dead_rows": 0.01}

    stage = "decoder" if name.startswith("mask_decoder") else "encoder"
    heads = [measures() for _ in range(n_heads)]
    return {"name": name, "stage": stage, "queries": 9, "keys": 4096, **measures(), "heads": heads}


def picture(path: Path, side: int, seed: int) -> None:
    """A picture with as much detail as a photograph."""
    noise = np.random.default_rng(seed).integers(0, 255, (side, side * 4 // 3, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((side // 3 + 1, side // 4 + 1)).resize((side * 4 // 3, side))
    smooth.save(path)


def _heat_map(target: Path, index: int, side: int, rng: random.Random) -> dict[str, Any]:
    names = {}
    for which in ("float", "quantized"):
        names[which] = f"heat/{index}-{which}.png"
        picture(target / names[which], side, 10 * index + len(which))
    values = {"entropy_float": 3.1, "entropy_quantized": 3.9, "kl": rng.uniform(0, 1), "focus_overlap": 0.42}
    name = f"{DECODER}.{[s for s in STAGES if 'token_to_image' in s][index % 3]}"
    return {"attention": name, "image": f"{index // 3:03d}.jpg", "box": [1.5, 2.0, 300.25, 200], **names, **values}


def _oscillation(rng: random.Random) -> dict[str, Any]:
    base = [0.05, 0.04, 0.03, 0.02, 0.06, 0.11, 0.08, 0.03, 0.4]
    units = ["layers.0.self_attn", "layers.0.pair", "layers.1.self_attn", "layers.1.pair", "final_attn_token_to_image"]
    moments = []
    for i, after in enumerate(["nearest rounding", "encoder", *(f"{DECODER}.{unit}" for unit in units)]):
        errors = [error * (1 - 0.07 * i) * rng.uniform(0.9, 1.1) for error in base]
        moments.append({"after": after, "errors": errors, "total_variation": 5 - 0.4 * i})
    neighbours = [
        {"stage": STAGES[1], "neighbour": STAGES[3], "before": 0.04, "after": 0.05},
        {"stage": STAGES[3], "neighbour": STAGES[1], "before": 0.03, "after": 0.02},
    ]
    last = moments[-1]
    final = {"errors": last["errors"], "total_variation": last["total_variation"]}
    return {"stages": STAGES, "moments": moments, **final, "neighbours": neighbours}


def _site(name: str, rng: random.Random) -> dict[str, Any]:
    low, high = -rng.uniform(1, 20), rng.uniform(1, 60)
    counts = [round(4000 * math.exp(-(((i - 30) / 9) ** 2))) + rng.randrange(3) for i in range(64)]
    probs = name.endswith("probs")
    return {
        "site": name,
        "grid": "log2" if probs else "uniform",
        "bits": 4,
        "low": low,
        "high": high,
        "grid_low": None if probs else 0.8 * low,
        "grid_high": None if probs else 0.7 * high,
        "clipped": rng.choice([0.0, 0.00001, 0.004, 0.03]),
        "modes": rng.choice([1, 1, 2]),
        "histogram": {"low": low, "high": high, "counts": counts},
    }


def _example(target: Path, role: str, side: int, rng: random.Random) -> dict[str, Any]:
    names = {}
    for which in ("float", "quantized", "truth"):
        names[which] = f"examples/{role}-{which}.png"
        picture(target / names[which], side, len(role + which))
    prompts = [
        {"box": [10.0, 20.0, 200.0, 220.5], "iou_float": rng.uniform(0.5, 1), "iou_quantized": rng.uniform(0, 1)}
        for _ in range(4)
    ]
    scores = {"mean_iou_float": 0.71, "mean_iou_quantized": 0.42}
    zooms = []
    for number in (2, 3):
        zoom = {}
        for which in ("float", "quantized", "truth"):
            zoom[which] = f"examples/{role}-{number}-{which}.png"
            picture(target / zoom[which], 48, number)
        zooms.append({"prompt": number, "region": [0, 0, 48, 48], **zoom})
    shown = {"role": role, "image": f"{role} <image> & more.jpg", **names}
    return {**shown, **scores, "prompts": prompts, "zooms": zooms}


def write_all(folder: Path, *, n_blocks: int = 3, **options: Any) -> Path:
    """A folder in which every section of the report has something to show."""
    write_packed(folder, n_blocks=n_blocks)
    write_results(folder, n_blocks=n_blocks)
    write_diagnosis(folder, n_blocks=n_blocks, **options)
    return folder
