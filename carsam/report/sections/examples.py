"""The worst and the median image: the float model's masks, the quantized model's, and the truth."""

from __future__ import annotations

from typing import Any

from carsam.report import numbers
from carsam.report.order import entries
from carsam.report.pictures import Pictures
from carsam.report.sections.accuracy import has_truth
from carsam.report.sections.base import Section, diagnosed, percent
from carsam.report.source import Source

_TITLES = {"worst": "The worst image", "median": "The median image"}


def section(source: Source, pictures: Pictures) -> Section:
    """The section."""
    diagnosis = source.diagnosis or {}
    found = [_example(entry, pictures) for entry in entries(diagnosis.get("examples"))]
    view = None
    if found:
        view = {
            "examples": found,
            "reference": diagnosis.get("reference") or "reference",
            "has_truth": has_truth(source),
        }
    return diagnosed(source, "examples", "Example images", view, "example images")


def _example(entry: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    role = str(entry.get("role", ""))
    image = str(entry.get("image", ""))
    floating, quantized = (percent(entry.get(f"mean_iou_{which}")) for which in ("float", "quantized"))
    panels = [
        ("Float", floating, f"{image} with the masks of the float model, mean IoU {numbers.decimal(floating)}"),
        (
            "Quantized",
            quantized,
            f"{image} with the masks of the quantized model, mean IoU {numbers.decimal(quantized)}",
        ),
        ("Truth", None, f"{image} with the masks of the ground truth"),
    ]
    prompts = []
    for index, prompt in enumerate(entries(entry.get("prompts")), 1):
        pair = [percent(prompt.get(key)) for key in ("iou_float", "iou_quantized")]
        change = None if None in pair else pair[1] - pair[0]
        scores = {"float": pair[0], "quantized": pair[1], "change": change}
        prompts.append({"index": index, "box": numbers.box(prompt.get("box")), **scores})
    return {
        "id": f"example-{role}" if role in _TITLES else "",
        "title": _TITLES.get(role, role.capitalize() or "An image"),
        "image": image,
        "float": floating,
        "quantized": quantized,
        "panels": [
            {"title": title, "iou": iou, "alt": alt, "picture": pictures.get(entry.get(title.lower()))}
            for title, iou, alt in panels
            if entry.get(title.lower())
        ],
        "prompts": prompts,
    }
