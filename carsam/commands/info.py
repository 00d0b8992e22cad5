"""``carsam info``: what a model folder holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from carsam.bits.plan import stated_bits
from carsam.commands.common import float16_bytes, megabytes, open_model, read_results
from carsam.commands.output import Json, Output, Quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def info(
    model: Annotated[
        str, typer.Argument(help="Packed folder, or a float model as for carsam quantize.", show_default=False)
    ],
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Show method, bits, sizes and layers of a model."""
    from carsam.models.family import family_of
    from carsam.output.finished import read_recipe
    from carsam.pack.checkpoint import folder_size
    from carsam.pack.source import packed_folder

    output = Output(json, quiet=quiet)
    folder = packed_folder(model)
    sam = open_model(model, "cpu")
    family = family_of(sam)
    half, size = float16_bytes(sam), family.image_size(sam)
    known: dict[str, Any] = {"model": model, "packed": folder is not None, "float16_bytes": half, "input_pixels": size}
    known["family"] = family.name
    if folder is not None:
        config = sam.config.quantization_config
        packed = folder_size(folder)
        recipe = read_recipe(folder)
        bits = stated_bits(config.bits, recipe)
        output.line(f"{model}: {config.method} at {bits}, written by carsam {config.carsam_version}")
        output.line(f"weights {megabytes(packed)}, {half / packed:.2f} times smaller than FP16's {megabytes(half)}")
        known |= {"method": config.method, "bits": config.bits, "carsam_version": config.carsam_version}
        known["decoder_only"] = recipe.get("decoder_only") is True
        known["budget"] = recipe.get("budget") or None
        known |= {"bytes": packed, "activation_grids": dict(grids(config.layout))}
    else:
        output.line(f"{model}: {family.names.title} in floating point, {megabytes(half)} in FP16")
    output.line(f"input {size} × {size} pixels")
    regions = region_rows(sam)
    known["regions"] = [asdict(region) for region in regions]
    output.print(layer_table(regions))
    if folder is not None:
        found = ", ".join(f"{name} × {count}" for name, count in known["activation_grids"].items())
        output.line(f"grids of activations: {found or 'none'}")
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
        output.line(f"recipe:\n{text.rstrip()}")
        scores = read_results(folder).get("evaluation")
        scores = scores if isinstance(scores, dict) else {}
        numbers = {key: scores.get(key) for key in ("segm_ap", "box_ap", "mean_iou")}
        numbers = {key: value for key, value in numbers.items() if isinstance(value, (int, float))}
        known |= {"recipe": text, "evaluation": {"coco": scores.get("coco"), **numbers} if numbers else None}
        if numbers:
            listed = ", ".join(f"{key} {value:.2f}" for key, value in numbers.items())
            output.line(f"last evaluation: {listed} ({scores.get('coco')})")
    output.save(known)


def grids(layout: dict[str, Any]) -> list[tuple[str, int]]:
    """How many activation sites lie on which grid: ``[("uniform", 100), ("log2", 15)]``."""
    specs = [spec["input"] for spec in layout["layers"].values()]
    specs += [spec for attention in layout["attentions"].values() for spec in attention.values()]
    return Counter(spec["grid"] for spec in specs if spec["bits"] < 16).most_common()


@dataclass(frozen=True)
class Region:
    """A part of the network.

    Attributes:
        region: Its title.
        layers: Quantizable layers; 0 for all that is not quantized.
        bits: How many layers have which bits of weights and inputs.
        weights: Parameters.
    """

    region: str
    layers: int
    bits: dict[str, int]
    weights: int


def region_rows(model: PreTrainedModel) -> list[Region]:
    """Quantizable layers and their parameters by region, and the rest."""
    from carsam.models.family import find_sites
    from carsam.pack.layers import PackedLayer

    sites = find_sites(model)
    names = sites.family.names

    layers: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    bits: dict[str, Counter[str]] = {region: Counter() for region in names.region_titles}
    for site in sites.layers:
        layer = model.get_submodule(site.name)
        region = names.region(site.name)
        packed = isinstance(layer, PackedLayer)
        weights = layer.weight_bits if packed else getattr(layer, "weight_bits", 16)
        activations = layer.input_quantizer.bits if hasattr(layer, "input_quantizer") else 16
        count = 1
        for side in layer.shape if packed else layer.weight.shape:
            count *= side
        layers[region] += 1
        sizes[region] += count
        bits[region][f"w{weights}a{activations}"] += 1
    rows = [Region(name, layers[name], dict(bits[name].most_common()), sizes[name]) for name in bits if layers[name]]
    return [*rows, Region("everything else", 0, {}, float16_bytes(model) // 2 - sum(sizes.values()))]


def layer_table(regions: list[Region]) -> Table:
    """The regions as a table."""
    table = Table("region", "layers", "bits of weights and inputs", "weights")
    for row in regions:
        several = len(row.bits) > 1
        text = ", ".join(f"{name} × {count}" if several else name for name, count in row.bits.items())
        table.add_row(row.region, str(row.layers or ""), text or "floating point", f"{row.weights / 1e6:.2f} M")
    return table
