"""Sizes: the weights file beside the float model's, by region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from carsam.report import numbers
from carsam.report.charts import BarRow, bar_rows
from carsam.report.sections.base import Section
from carsam.report.source import Source

# Buffers of grids, which a float model has none of.
_GRID_LEAVES = {"weight_scale", "weight_zero_point", "scale", "zero_point", "group", "split", "offset", "tau"}
_REST = "everything else"


@dataclass
class RegionSize:
    """A region of the network.

    Attributes:
        title: Its name.
        layers: Quantized layers in it.
        parameters: Weights and biases, as the float model has them.
        bytes: What they and their grids take in the file.
        bits: Bits of the weights, ``4`` or ``4 and 8``.
    """

    title: str
    layers: int = 0
    parameters: int = 0
    bytes: int = 0
    bits: str = ""

    @property
    def half(self) -> int:
        """Bytes in FP16."""
        return 2 * self.parameters


def region_sizes(source: Source) -> list[RegionSize]:
    """Sizes by region; empty where the weights file is not there."""
    weight_bits = {site.name: numbers.finite(site.bits) for site in source.sites if site.kind == "weight"}
    region = source.names.region
    sizes = {title: RegionSize(title) for title in (*source.names.region_titles, _REST)}
    for name, tensor in source.tensors.items():
        layer, _, leaf = name.rpartition(".")
        owner = next((path for path in (layer, layer.removesuffix(".input_quantizer")) if path in weight_bits), None)
        entry = sizes[region(owner) if owner else _REST]
        if owner is None and ".matmul." in name:
            entry = sizes[region(name)]
        entry.bytes += tensor.bytes
        if leaf in _GRID_LEAVES:
            continue
        count = 1
        for side in tensor.shape:
            count *= side
        bits = weight_bits.get(layer)
        if leaf == "weight" and layer in weight_bits:
            entry.layers += 1
            if bits is not None and 0 < bits <= 8:
                # Codes are packed into a stream of bytes; at most seven bits at its end are padding.
                count = int(tensor.bytes * 8 // bits)
        entry.parameters += count
    for entry in sizes.values():
        found = {bits for path, bits in weight_bits.items() if bits is not None and region(path) == entry.title}
        entry.bits = " and ".join(numbers.whole(bits) for bits in sorted(found)) or "16"
    return [entry for entry in sizes.values() if entry.bytes]


def float16_bytes(regions: list[RegionSize]) -> int | None:
    """What the float model weighs in FP16; None where it is not known."""
    return sum(entry.half for entry in regions) or None


def section(source: Source) -> Section:
    """The section."""
    regions = region_sizes(source)
    if not regions:
        return Section("size", "Size", None, "The folder holds no model.safetensors, so its size is not known.")
    half = float16_bytes(regions)
    packed = source.weights_bytes
    rows = []
    for entry in regions:
        words = f"{numbers.size(entry.half)} → {numbers.size(entry.bytes)}"
        rows.append(BarRow(entry.title, words, [(entry.half, "float"), (entry.bytes, "quantized")]))
    rest = sum(entry.bytes for entry in regions if entry.title == _REST)
    view: dict[str, Any] = {
        "regions": regions,
        "packed": packed,
        "half": half,
        "ratio": half / packed if half and packed else None,
        "parameters": sum(entry.parameters for entry in regions),
        "rest": rest / sum(entry.bytes for entry in regions),
        "chart": bar_rows(
            rows,
            name="size-chart",
            title="Bytes by region, in FP16 and packed",
            desc="; ".join(f"{row.label}: {row.text}" for row in rows),
        ),
    }
    return Section("size", "Size", view)
