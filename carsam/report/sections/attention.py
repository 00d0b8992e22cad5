"""Attention dissipation: heat maps of the mask token, and entropies per attention and head (METHOD.md, 10)."""

from __future__ import annotations

import math
from typing import Any

from carsam.models.names import Names
from carsam.report import numbers
from carsam.report.charts import Dot, DotRow, dot_rows
from carsam.report.order import entries
from carsam.report.pictures import Pictures
from carsam.report.sections.base import Section, diagnosed
from carsam.report.source import Source

_FIRST_MAPS = 8
_MOST_MAPS = 64
# Queries without any attention, as a share, that are worth a sentence.
_MANY_DEAD = 0.005


def section(source: Source, pictures: Pictures) -> Section:
    """The section."""
    diagnosis = source.diagnosis or {}
    attentions = entries(diagnosis.get("attentions"))
    maps = [_heat_map(entry, pictures, source.names) for entry in entries(diagnosis.get("heat_maps"))[:_MOST_MAPS]]
    view = None
    if attentions or maps:
        view = {
            "maps": maps[:_FIRST_MAPS],
            "more_maps": maps[_FIRST_MAPS:],
            "attentions": attentions,
            "charts": [
                (stage, _chart(stage, [a for a in attentions if a.get("stage") == stage], source.names))
                for stage in ("decoder", "encoder")
                if any(a.get("stage") == stage for a in attentions)
            ],
            "heads": [
                {"attention": attention.get("name"), "index": index, **head}
                for attention in attentions
                for index, head in enumerate(entries(attention.get("heads")))
            ],
            "has_rows": any("row_sum" in attention for attention in attentions),
            "worst": _most(attentions, "kl", 0.0),
            "dead": _most(attentions, "dead_rows", _MANY_DEAD),
        }
    return diagnosed(source, "attention", "Attention", view, "attention maps")


def _most(attentions: list[dict[str, Any]], key: str, least: float) -> dict[str, Any] | None:
    """The attention with the largest value of a measure, if that is above ``least``."""
    known = [(value, a) for a in attentions if (value := numbers.finite(a.get(key))) is not None and value > least]
    return max(known, key=lambda pair: pair[0], default=(None, None))[1]


def spread(entropy: Any, keys: Any) -> float | None:
    """An entropy in nats as a share of the largest that it could be, in percent."""
    entropy, keys = numbers.finite(entropy), numbers.finite(keys)
    if entropy is None or keys is None or keys <= 1:
        return None
    return 100 * entropy / math.log(keys)


def _chart(stage: str, attentions: list[dict[str, Any]], names: Names) -> Any:
    rows, words = [], []
    for attention in attentions:
        keys, name = attention.get("keys"), names.compact(attention.get("name"))
        floating, quantized = (spread(attention.get(f"entropy_{which}"), keys) for which in ("float", "quantized"))
        values = f"{numbers.number(floating)} → {numbers.number(quantized)} %"
        heads = [
            Dot(spread(head.get("entropy_quantized"), keys), "quantized head", "tick")
            for head in entries(attention.get("heads"))
        ]
        dots = [
            *heads,
            Dot(floating, "float", "circle", f"{name}, float: {numbers.number(floating)} %"),
            Dot(quantized, "quantized", "square", f"{name}, quantized: {numbers.number(quantized)} %"),
        ]
        rows.append(DotRow(name, dots, values, joined=True))
        words.append(f"{name}: {values}")
    return dot_rows(
        rows,
        name=f"attention-{stage}",
        title=f"Entropy of the {stage}'s attentions, float and quantized",
        desc=f"In percent of the largest possible entropy, float to quantized. {'; '.join(words)}.",
        low=0.0,
        high=100.0,
    )


def _heat_map(entry: dict[str, Any], pictures: Pictures, names: Names) -> dict[str, Any]:
    name, image = names.compact(entry.get("attention")), str(entry.get("image", ""))
    return {
        **entry,
        "name": name,
        "image": image,
        "box_text": numbers.box(entry.get("box")),
        "panels": [
            {
                "title": which.capitalize(),
                "alt": f"Attention of the mask token over {image} in {name}, {which} model: "
                f"entropy {numbers.number(entry.get(f'entropy_{which}'))} nats",
                "picture": pictures.get(entry.get(which)),
            }
            for which in ("float", "quantized")
        ],
    }
