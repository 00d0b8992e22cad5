"""Names of sites: their execution order, the part of the network they lie in, and shorter forms.

``config.json`` keeps its keys sorted by name, and the report loads no model that could tell the order, so it is told
from the names. Names that are not known here come last among their siblings, with numbers in them as numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Of any two siblings, the one that runs first comes first.
_RANKS = {
    name: rank
    for rank, name in enumerate(
        (
            *("vision_encoder", "memory_attention", "mask_decoder", "transformer", "backbone", "layers", "blocks"),
            *("neck", "final_attn_token_to_image", "self_attn", "attn", "cross_attn_token_to_image", "mlp"),
            *("cross_attn_image_to_token", "qkv", "q_proj", "k_proj", "v_proj", "query", "key", "value", "probs"),
            *("proj", "out_proj", "lin1", "lin2", "conv1", "conv2", "input", "weight"),
        )
    )
}
OPERANDS = {"query": "Q", "key": "K", "value": "V", "probs": "P"}
OPERAND_TITLES = {"query": "queries", "key": "keys", "value": "values", "probs": "attention probabilities"}
_SHORT = (("mask_decoder.transformer.", "decoder."), ("vision_encoder.", "encoder."))
_BRIEF = {
    "final_attn_token_to_image": "final",
    "cross_attn_token_to_image": "tok→img",
    "cross_attn_image_to_token": "img→tok",
    "self_attn": "self",
}


@dataclass(frozen=True)
class Site:
    """One place that is quantized.

    Attributes:
        name: As bit settings match it: a layer's path (its weights), ``….input``, or an attention's ``….query``.
        kind: ``weight`` or ``activation``.
        grid: Name of the grid.
        bits: None where it is not known.
        layer: The layer that it belongs to, or ``attention``, for headings.
        part: ``w``, ``in``, or ``Q``, ``K``, ``V``, ``P``.
        group: The block, attention or MLP that it lies in.
    """

    name: str
    kind: str
    grid: str
    bits: float | None
    layer: str
    part: str
    group: str

    @property
    def role(self) -> str:
        """In words: ``weights``, ``input``, ``queries``."""
        if self.kind == "weight":
            return "weights"
        return OPERAND_TITLES.get(self.name.rpartition(".")[2], "input")


def execution_key(path: str) -> tuple[Any, ...]:
    """Sort key of a module path or site."""
    key: list[tuple[int, int, str]] = []
    for part in path.split("."):
        if part.isdigit():
            key.append((0, int(part), ""))
        elif part in _RANKS:
            key.append((1, _RANKS[part], ""))
        else:
            key += [(2, 0, part)]
    return tuple(key)


def site_key(site: Site) -> tuple[Any, ...]:
    """Sort key of a site: a layer's input comes before its weights."""
    return execution_key(f"{site.name}.weight" if site.kind == "weight" else site.name)


def layout_sites(layout: dict[str, Any]) -> list[Site]:
    """Every site of a packed model's layout, in execution order.

    Args:
        layout: ``layout`` of ``quantization_config`` (:mod:`carsam.pack.layout`).
    """
    sites = []
    for path, spec in mapping(layout.get("layers")).items():
        leaf, group, spec = path.rpartition(".")[2], _group(path), mapping(spec)
        grid = mapping(spec.get("input"))
        name = f"{path}.input"
        sites.append(Site(name, "activation", str(grid.get("grid", "")), grid.get("bits"), leaf, "in", group))
        sites.append(Site(path, "weight", "uniform", spec.get("weight"), leaf, "w", group))
    for path, operands in mapping(layout.get("attentions")).items():
        for which, grid in mapping(operands).items():
            name, grid = f"{path}.{which}", mapping(grid)
            part = OPERANDS.get(which, which)
            sites.append(
                Site(name, "activation", str(grid.get("grid", "")), grid.get("bits"), "attention", part, _group(name))
            )
    return sorted(sites, key=site_key)


def _group(path: str) -> str:
    """An encoder block is one group; in the decoder, each attention and MLP is."""
    block = re.match(r"vision_encoder\..*?\b(?:layers|blocks)\.\d+(?=\.)", path)
    return block[0] if block else path.rpartition(".")[0]


def group_of(site_name: str) -> str:
    """The group of an activation or weight site by its name alone."""
    return _group(site_name.removesuffix(".input"))


def region(path: str) -> str:
    """The region of the network that a layer or group lies in."""
    if path.startswith("vision_encoder."):
        return "encoder neck" if ".neck" in path else "encoder blocks"
    if path.startswith("mask_decoder.transformer."):
        return "decoder transformer"
    return "other quantized layers"


REGIONS = ("encoder blocks", "encoder neck", "decoder transformer", "other quantized layers")


def short(name: Any) -> str:
    """``encoder.layers.3.attn.qkv`` for ``vision_encoder.layers.3.attn.qkv``."""
    name = str(name)
    for prefix, replacement in _SHORT:
        name = name.replace(prefix, replacement)
    return name


def compact(name: Any) -> str:
    """A name in words short enough for a chart on a phone: ``decoder 0 tok→img out_proj input``, ``encoder 3 attn``."""
    words = []
    for part in short(name).split("."):
        if part not in ("layers", "blocks", "backbone"):
            words.append(_BRIEF.get(part, part))
    return " ".join(words)


def row_label(group: str) -> str:
    """A group in about ten characters, for the map: ``block 12``, ``0 tok→img``."""
    words = compact(group)
    if region(group) == "encoder blocks":
        return words.replace("encoder", "block", 1)
    return words.removeprefix("encoder ").removeprefix("decoder ")


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def entries(value: Any) -> list[dict[str, Any]]:
    """The mappings in a list; nothing where it is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers_of(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []
