"""The page: sections rendered into one HTML file, written whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from carsam.bits.plan import beside_bits
from carsam.evaluate.intervals import Difference
from carsam.models.names import Names
from carsam.output.files import write_text
from carsam.report import charts, numbers
from carsam.report.changes import few_objects, find_changes
from carsam.report.pictures import Pictures
from carsam.report.sections import all_sections
from carsam.report.sections.accuracy import DIAGNOSIS, comparable, has_truth, scores
from carsam.report.sections.base import UNKNOWN, Section
from carsam.report.source import Source, read_source

# So that it can be sent by mail and opened on a phone.
MAX_BYTES = 5_000_000
# Pictures never need more than this, however little else there is.
_PICTURE_BUDGET = 3_500_000
_MARGIN = 50_000


@dataclass(frozen=True)
class Report:
    """A page.

    Attributes:
        html: All of it.
        missing: Titles of the sections of which nothing is known.
        left_out: Pictures for which the page had no room.
        refused: Names of pictures that are there but cannot be shown, with the reason.
    """

    html: str
    missing: tuple[str, ...]
    left_out: int
    refused: dict[str, str]


def write_report(folder: str | Path, out: str | Path, float_scores: str | Path | None = None) -> Report:
    """Makes the report of a packed folder.

    Args:
        folder: What ``carsam quantize`` wrote, with ``diagnosis`` in it if it was diagnosed.
        out: The HTML file; an earlier one is replaced at once or not at all.
        float_scores: What ``carsam evaluate FLOAT --json`` wrote, to compare with.

    Raises:
        CarsamError: It is not a packed folder, a file in it is damaged, or ``out`` cannot be written.
    """
    report = render(read_source(folder, float_scores))
    write_text(out, report.html)
    return report


def render(source: Source) -> Report:
    """The page of a folder that was read; the same folder gives the same page."""
    pictures = Pictures(source.pictures)
    sections = all_sections(source, pictures)
    template = _environment(source.names).get_template("report.html.j2")
    context = {"sections": sections, "summary": summary(source, sections), "refused": pictures.refused}
    # Once without pictures: what they may take is what the rest leaves.
    pictures.encode(0)
    rest = len(template.render(**context).encode())
    left_out = pictures.encode(max(0, min(_PICTURE_BUDGET, MAX_BYTES - _MARGIN - rest)))
    missing = tuple(s.title for s in sections if s.view is None and s.absent == UNKNOWN)
    return Report(template.render(**context, left_out=left_out), missing, left_out, pictures.refused)


def summary(source: Source, sections: list[Section]) -> dict[str, Any]:
    """What stands above everything: model, method, bits, size and accuracy."""
    size = next(section.view for section in sections if section.id == "size") or {}
    model = str(source.recipe.get("model") or "").rstrip("/")
    rows = scores(source)
    ious = [score for score in rows if score["key"] in ("mean_iou", DIAGNOSIS)]
    # The first that says what quantization cost; one without the float model's beside it is better than none.
    headline = next((score for score in ious if score["change"] is not None), next(iter(ious), None))
    return {
        "model": model.rpartition("/")[2] or source.folder.resolve().name,
        "kind": source.names.title if source.names.family else "",
        "method": str(source.quantization_config.get("method") or "an unknown method"),
        "bits": str(source.quantization_config.get("bits") or "").upper(),
        "beside_bits": beside_bits(source.recipe),
        "stand_in": source.is_stand_in,
        "few_objects": few_objects(source),
        "interval": _interval(source),
        "version": source.quantization_config.get("carsam_version"),
        "packed": size.get("packed") or source.weights_bytes,
        "half": size.get("half"),
        "ratio": size.get("ratio"),
        "scores": [score for score in rows if score["key"] != DIAGNOSIS],
        "iou": headline,
        "iou_is_of_diagnosis": bool(headline) and headline["key"] == DIAGNOSIS,
        "iou_is_with_float": bool(headline) and headline["key"] == DIAGNOSIS and not has_truth(source),
        "prompts": source.evaluation.get("n_prompts"),
        "diagnosis": source.diagnosis or {},
        "seconds": source.quantization.get("seconds"),
        "memory": source.quantization.get("peak_memory_bytes"),
    }


def _interval(source: Source) -> Difference | None:
    """The difference of mean IoU to the float model, with its interval."""
    changes = find_changes(source.evaluation, comparable(source))
    return changes.difference if changes else None


def breakable(name: Any) -> Markup:
    """A dotted name that may break after its dots and underscores."""
    text = str(escape(str(name)))
    for mark in "._/":
        text = text.replace(mark, f"{mark}<wbr>")
    return Markup(text)


def _environment(names: Names) -> Environment:
    environment = Environment(
        loader=PackageLoader("carsam.report"),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
    )
    environment.filters.update(
        breakable=breakable,
        short=names.short,
        number=numbers.number,
        whole=numbers.whole,
        decimal=numbers.decimal,
        signed=numbers.signed,
        percent=numbers.percent,
        grouped=numbers.count,
        plural=numbers.plural,
        plural_of=lambda items, noun: numbers.plural(len(items), noun),
        size=numbers.size,
        duration=numbers.duration,
    )
    environment.globals.update(swatch=charts.swatch, MISSING=numbers.MISSING)
    return environment
