"""Where a model is quantized, in terms that hold for every family: layers, attentions, and what they feed.

A family fills these in (``carsam/models/<family>/sites.py``); nothing else spells the name of a module.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from carsam.models.family import Family

OPERANDS = ("query", "key", "value", "probs")


@dataclass(frozen=True)
class LayerSite:
    """A Linear or Conv2d: its module path. Bit settings match ``name`` (weights) and ``name.input`` (activations).

    Attributes:
        name: Module path.
        role: What the layer does where a method cares: ``projection`` of an attention's query, key or value,
            ``mlp_in`` and ``mlp_out`` of an MLP, ``depthwise`` convolution; empty otherwise.
    """

    name: str
    role: str = ""

    @property
    def input(self) -> str:
        """Name of the activation site at the layer's input."""
        return f"{self.name}.input"


PROJECTION, MLP_IN, MLP_OUT, DEPTHWISE = "projection", "mlp_in", "mlp_out", "depthwise"


@dataclass(frozen=True)
class Projection:
    """The layer, or the part of one, that computes an attention's query, key or value.

    Attributes:
        layer: Module path.
        part: Which of ``parts`` equal slices of the output channels.
        parts: 1, or 3 where one Linear gives all three.
    """

    layer: str
    part: int = 0
    parts: int = 1

    def rows(self, channels: int) -> slice:
        """The output channels, of ``channels`` in all."""
        width = channels // self.parts
        return slice(self.part * width, (self.part + 1) * width)


@dataclass(frozen=True)
class AttentionSite:
    """An attention with the layers around its two MatMuls.

    Attributes:
        name: Module path.
        query, key, value: The projections before QKᵀ and PV.
        output: Module path of the Linear after PV.
        positions: Names of the attention's parameters whose rows meet the query as further keys (relative positions);
            what scales a channel of the query must divide theirs.
        coupled: The attention is called with ``query``, ``key`` and ``value`` of its own, which may come from two
            streams (a decoder's); otherwise all three come from one tensor.
        rotary: Queries and keys are rotated by their positions (RoPE) between projection and MatMul.
        pooled: Queries are pooled, channel by channel, between projection and MatMul.
    """

    name: str
    query: Projection
    key: Projection
    value: Projection
    output: str
    positions: tuple[str, ...] = ()
    coupled: bool = False
    rotary: bool = False
    pooled: bool = False

    def operand(self, which: str) -> str:
        """Name of the activation site of ``query``, ``key``, ``value`` or ``probs``."""
        return f"{self.name}.{which}"


@dataclass(frozen=True)
class Moment:
    """A point along the decoder at which its error is measured.

    Attributes:
        name: Module path of the attention or MLP.
        output: Module path of what gives the stream that the rest of the decoder reads (the norm after the residual).
    """

    name: str
    output: str


@dataclass(frozen=True)
class ResidualStream:
    """The stream of an image encoder that its blocks add to, where its channels may be mixed (METHOD.md, 9).

    Every module that reads it is named: norms over its channels with the layers behind them, or layers themselves.

    Attributes:
        writers: Layers whose outputs are added to it.
        tables: Parameters that are added to it, channels last (position embeddings).
        readers: Layers that read it without a norm.
    """

    writers: tuple[str, ...]
    tables: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Sites:
    """All sites of one model, in execution order.

    Attributes:
        family: The family that the model belongs to.
        layers: Linear and Conv2d sites.
        attentions: Attention sites.
        encoder_stages, decoder_stages: Module paths that run one after the other (:class:`carsam.models.family.Stage`).
        memory_stages: Module paths of the stages of a video's memory; empty where there is none.
        decoder: Module path that all sites of the decoder lie under; everything else is the encoder.
        readers: ``(norm, layer)`` module paths: the layer alone reads what the norm gives, so that channels may be
            scaled in one and divided in the other.
        padded: Those of these layers that also read zeros, padded in after the norm: its bias cannot be moved to them.
        residual: The image encoder's stream, where an orthogonal map may turn it; else the reason why none may, in
            words that follow "because".
        moments: The decoder's parts.
        neighbours: ``(part, neighbour)`` of the decoder: each reads what the other writes (METHOD.md, 8).
        focus: Attentions whose maps over the image show what a mask rests on.
        floating: Layers that the family leaves in floating point by choice; ``benchmarks/floating_parts.py`` measures
            what it would cost to quantize them as well.
    """

    family: Family = field(repr=False, compare=False)
    layers: tuple[LayerSite, ...]
    attentions: tuple[AttentionSite, ...]
    encoder_stages: tuple[str, ...]
    decoder_stages: tuple[str, ...]
    decoder: str
    readers: tuple[tuple[str, str], ...] = ()
    padded: tuple[str, ...] = ()
    residual: ResidualStream | str = "the family does not say what reads and writes the stream"
    moments: tuple[Moment, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    focus: tuple[str, ...] = ()
    floating: tuple[LayerSite, ...] = ()
    memory_stages: tuple[str, ...] = ()
    activation_names: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        names = [site.input for site in self.layers]
        names += [site.operand(which) for site in self.attentions for which in OPERANDS]
        object.__setattr__(self, "activation_names", tuple(names))

    def in_decoder(self, path: str) -> bool:
        """Whether a module path lies in the decoder."""
        return path == self.decoder or path.startswith(self.decoder + ".")

    def of_decoder(self) -> Sites:
        """The decoder's sites alone: what is left to quantize when the image encoder stays in floating point."""
        return replace(
            self,
            layers=tuple(site for site in self.layers if self.in_decoder(site.name)),
            attentions=tuple(site for site in self.attentions if self.in_decoder(site.name)),
            encoder_stages=(),
            memory_stages=(),
            readers=tuple(pair for pair in self.readers if self.in_decoder(pair[1])),
            residual="the image encoder stays in floating point",
        )

    def on_images(self) -> Sites:
        """The sites that an image with its prompts meets: all but those of a video's memory."""

        def outside(path: str) -> bool:
            return not any(path == stage or path.startswith(stage + ".") for stage in self.memory_stages)

        return replace(
            self,
            layers=tuple(site for site in self.layers if outside(site.name)),
            attentions=tuple(site for site in self.attentions if outside(site.name)),
            readers=tuple(pair for pair in self.readers if outside(pair[1])),
            memory_stages=(),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a bit setting can match: weights (a layer's path) and activation sites."""
        return tuple(site.name for site in self.layers) + self.activation_names


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` where ``name`` stands in ``model``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
