"""``carsam info``: what a model folder holds."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from carsam.commands.common import float16_bytes, megabytes, open_model, out, read_results

if TYPE_CHECKING:
    from transformers import SamModel

REGIONS = {
    "vision_encoder.layers": "encoder blocks",
    "vision_encoder.neck": "encoder neck",
    "mask_decoder.transformer": "decoder transformer",
}


def info(
    model: Annotated[
        str, typer.Argument(help="Packed folder, or a float model as for carsam quantize.", show_default=False)
    ],
) -> None:
    """Show method, bits, sizes and layers of a model."""
    from carsam.pack.checkpoint import folder_size
    from carsam.pack.source import packed_folder

    folder = packed_folder(model)
    sam = open_model(model, "cpu")
    half = float16_bytes(sam)
    if folder is not None:
        config = sam.config.quantization_config
        packed = folder_size(folder)
        _line(f"{model}: {config.method} at {config.bits}, written by carsam {config.carsam_version}")
        _line(f"weights {megabytes(packed)}, {half / packed:.2f} times smaller than FP16's {megabytes(half)}")
    else:
        _line(f"{model}: SAM in floating point, {megabytes(half)} in FP16")
    _line(f"input {sam.config.vision_config.image_size} × {sam.config.vision_config.image_size} pixels")
    out.print(layer_table(sam))
    if folder is not None:
        _line(f"grids of activations: {grids(config.layout)}")
        _line("recipe:")
        _line((folder / "recipe.yaml").read_text(encoding="utf-8").rstrip())
        scores = read_results(folder).get("evaluation", {})
        known = [f"{key} {scores[key]:.2f}" for key in ("segm_ap", "box_ap", "mean_iou") if key in scores]
        if known:
            _line(f"last evaluation: {', '.join(known)} ({scores.get('coco')})")


def grids(layout: dict[str, Any]) -> str:
    """How many activation sites lie on which grid: ``uniform × 100, log2 × 15``."""
    specs = [spec["input"] for spec in layout["layers"].values()]
    specs += [spec for attention in layout["attentions"].values() for spec in attention.values()]
    found = Counter(spec["grid"] for spec in specs if spec["bits"] < 16)
    return ", ".join(f"{name} × {count}" for name, count in found.most_common()) or "none"


def layer_table(model: SamModel) -> Table:
    """Quantizable layers and their parameters by region, and the rest."""
    from carsam.models.sites import find_sites
    from carsam.pack.layers import PackedLayer

    layers: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    bits: dict[str, Counter[str]] = {region: Counter() for region in REGIONS.values()}
    for site in find_sites(model).linears:
        layer = model.get_submodule(site.name)
        region = next(title for prefix, title in REGIONS.items() if site.name.startswith(prefix))
        packed = isinstance(layer, PackedLayer)
        weights = layer.weight_bits if packed else getattr(layer, "weight_bits", 16)
        activations = layer.input_quantizer.bits if hasattr(layer, "input_quantizer") else 16
        count = 1
        for side in layer.shape if packed else layer.weight.shape:
            count *= side
        layers[region] += 1
        sizes[region] += count
        bits[region][f"w{weights}a{activations}"] += 1
    table = Table("region", "layers", "bits of weights and inputs", "weights")
    for region in REGIONS.values():
        text = ", ".join(f"{name} × {n}" if len(bits[region]) > 1 else name for name, n in bits[region].most_common())
        table.add_row(region, str(layers[region]), text, f"{sizes[region] / 1e6:.2f} M")
    rest = float16_bytes(model) // 2 - sum(sizes.values())
    table.add_row("everything else", "", "floating point", f"{rest / 1e6:.2f} M")
    return table


def _line(text: str) -> None:
    out.print(text, markup=False, soft_wrap=True)
