"""The worst and the median image: the float model's masks, the quantized model's, and the truth."""

from __future__ import annotations

from typing import Any

from carsam.report import numbers
from carsam.report.order import entries
from carsam.report.pictures import Pictures
from carsam.report.sections.accuracy import has_truth
from carsam.report.sections.base import Section, diagnosed, percent
from carsam.report.source import Source

_MOST_EXAMPLES, _MOST_ZOOMS = 8, 8
_WHOSE = {
    "Float": "mask of the float model",
    "Quantized": "mask of the quantized model",
    "Truth": "mask of the ground truth",
}
_TITLES = {"worst": "The worst image", "median": "The median image"}


def section(source: Source, pictures: Pictures) -> Section:
    """The section."""
    diagnosis = source.diagnosis or {}
    found = [_example(entry, pictures) for entry in entries(diagnosis.get("examples"))[:_MOST_EXAMPLES]]
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
        "zooms": [_zoom(zoom, image, prompts, pictures) for zoom in entries(entry.get("zooms"))[:_MOST_ZOOMS]],
    }


def _zoom(entry: dict[str, Any], image: str, prompts: list[dict[str, Any]], pictures: Pictures) -> dict[str, Any]:
    """A small object, enlarged, with the scores of its prompt."""
    number = numbers.finite(entry.get("prompt"))
    prompt = next((prompt for prompt in prompts if prompt["index"] == number), {})
    panels = []
    for title in ("Float", "Quantized", "Truth"):
        if entry.get(title.lower()):
            iou = prompt.get(title.lower())
            words = f", IoU {numbers.decimal(iou)}" if iou is not None else ""
            alt = f"Object {numbers.whole(number)} of {image} enlarged, {_WHOSE[title]}{words}"
            panels.append({"title": title, "iou": iou, "alt": alt, "picture": pictures.get(entry.get(title.lower()))})
    return {"number": number, "change": prompt.get("change"), "panels": panels}
