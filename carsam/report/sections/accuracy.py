"""Accuracy: scores on a COCO data set, beside the float model's where they are known."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from carsam.report import numbers
from carsam.report.changes import few_objects, find_changes, notes
from carsam.report.charts import columns
from carsam.report.commands import evaluate_command, float_model, report_command
from carsam.report.order import entries, mapping, numbers_of
from carsam.report.sections.base import Section, percent
from carsam.report.source import Source

_SCORES = (
    *(("mean_iou", "Mean IoU"), ("segm_ap", "Segm AP"), ("segm_ap50", "Segm AP50"), ("segm_ap75", "Segm AP75")),
    *(("segm_ap_small", "Segm AP, small objects"), ("segm_ap_medium", "Segm AP, medium objects")),
    *(("segm_ap_large", "Segm AP, large objects"), ("box_ap", "Box AP")),
)
DIAGNOSIS = "diagnosis"
_WORST = 8
_BINS = 10


def scores(source: Source) -> list[dict[str, Any]]:
    """Name, quantized and float score, and their difference, in percent.

    Float scores only where they were measured on as many prompts; the diagnosis measures both models on its own.
    """
    mine, other = source.evaluation, comparable(source)
    rows = [{"key": key, "name": name, "quantized": mine.get(key), "float": other.get(key)} for key, name in _SCORES]
    clicks = mapping(mapping(mine.get("points")).get("mean_iou"))
    other_clicks = mapping(mapping(other.get("points")).get("mean_iou"))
    for key, value in clicks.items():
        name = f"Mean IoU after {key} click{'' if str(key) == '1' else 's'}"
        rows.append({"key": f"clicks-{key}", "name": name, "quantized": value, "float": other_clicks.get(key)})
    diagnosis = source.diagnosis or {}
    pair = [percent(diagnosis.get(f"mean_iou_{which}")) for which in ("quantized", "float")]
    if None not in pair:
        row = {"key": DIAGNOSIS, "name": "Mean IoU of the diagnosis", "quantized": pair[0], "float": pair[1]}
        if not has_truth(source):
            # The float model agrees with itself: its 100 percent say nothing.
            row |= {"name": "Mean IoU with the float model’s masks", "float": None}
        rows.append(row)
    for row in rows:
        pair = numbers.finite(row["quantized"]), numbers.finite(row["float"])
        row["change"] = None if None in pair else pair[0] - pair[1]
    return [row for row in rows if numbers.finite(row["quantized"]) is not None]


def has_truth(source: Source) -> bool:
    """Whether the diagnosis scores masks against the ground truth, and not the float model's."""
    return not str((source.diagnosis or {}).get("reference", "")).startswith("float")


def comparable(source: Source) -> dict[str, Any]:
    """The float model's scores where they are of the same images and prompts; else empty."""
    keys = ("n_images", "n_prompts")
    same = all(source.float_evaluation.get(key) == source.evaluation.get(key) for key in keys)
    return source.float_evaluation if same else {}


def section(source: Source) -> Section:
    """The section."""
    command = evaluate_command(source)
    rows = scores(source)
    if not rows:
        return Section("accuracy", "Accuracy", None, "The model has not been measured on a data set.", command)
    images = [
        (str(image.get("name")), numbers.finite(image.get("mean_iou")), len(numbers_of(image.get("ious"))))
        for image in entries(source.evaluation.get("per_image"))
    ]
    images = [image for image in images if image[1] is not None]
    images.sort(key=lambda image: image[1])
    counts = [0] * _BINS
    for _, iou, _ in images:
        counts[min(_BINS - 1, max(0, int(iou * _BINS / 100)))] += 1
    title = "Images by their mean IoU"
    bins = [f"{10 * i} to {10 * i + 10}: {n}" for i, n in enumerate(counts) if n]
    floating = comparable(source)
    view = {
        "rows": rows,
        "diagnosis": source.diagnosis if rows[-1]["key"] == DIAGNOSIS else None,
        "evaluation": source.evaluation,
        "float_known": bool(floating),
        "float_elsewhere": bool(source.float_evaluation and source.evaluation) and not floating,
        "float_prompts": source.float_evaluation.get("n_prompts"),
        "command": command,
        "float_commands": [
            f"{evaluate_command(source, float_model(source))} --json FLOAT.json",
            report_command(source, float_scores=True),
        ],
        "data": PurePath(str(source.evaluation.get("coco") or "")).name,
        "stand_in": source.is_stand_in,
        "changes": find_changes(source.evaluation, floating),
        "moved": [row for row in rows if row["change"] is not None and row["key"] in ("segm_ap", "box_ap")],
        "few": few_objects(source),
        "notes": notes(source),
        "worst": images[:_WORST],
        "n_images": len(images),
        "chart": columns(counts, 0, 100, name="accuracy-images", title=title, desc=f"{title}. {'; '.join(bins)}.")
        if images
        else None,
    }
    return Section("accuracy", "Accuracy", view)
