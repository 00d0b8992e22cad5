"""Where a model is quantized. The only file that knows the module names of transformers' SAM.

Quantized (METHOD.md, 1): the input and weights of every Linear and Conv of the image encoder's blocks and neck and of
the decoder's two-way transformer, and both inputs of both attention MatMuls. Everything else stays in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers import SamModel

from carsam.errors import CheckpointError

ENCODER, DECODER = "vision_encoder", "mask_decoder"
OPERANDS = ("query", "key", "value", "probs")


@dataclass(frozen=True)
class LinearSite:
    """A Linear or Conv2d: its module path. Bit settings match ``name`` (weights) and ``name.input`` (activations)."""

    name: str

    @property
    def input(self) -> str:
        """Name of the activation site at the layer's input."""
        return f"{self.name}.input"


@dataclass(frozen=True)
class AttentionSite:
    """An attention and the projections before its MatMuls.

    Attributes:
        name: Module path.
        fused: The encoder's form: one ``qkv`` Linear, relative positions; otherwise ``q_proj``, ``k_proj``, ``v_proj``.
    """

    name: str
    fused: bool

    def operand(self, which: str) -> str:
        """Name of the activation site of ``query``, ``key``, ``value`` or ``probs``."""
        return f"{self.name}.{which}"


@dataclass(frozen=True)
class TwoWayBlock:
    """A decoder block: self-attention, then the coupled pair token→image (with MLP) and image→token."""

    name: str

    @property
    def self_attention(self) -> str:
        return f"{self.name}.self_attn"

    @property
    def token_to_image(self) -> str:
        return f"{self.name}.cross_attn_token_to_image"

    @property
    def mlp(self) -> str:
        return f"{self.name}.mlp"

    @property
    def image_to_token(self) -> str:
        return f"{self.name}.cross_attn_image_to_token"

    @property
    def pair_entry(self) -> str:
        """The module whose output is the token side's input to the pair (layer norm after self-attention)."""
        return f"{self.name}.layer_norm1"


@dataclass(frozen=True)
class Sites:
    """All sites of one model, in execution order.

    Attributes:
        linears: Linear and Conv2d sites.
        attentions: Attention sites.
        encoder_stages: Module paths that run one after the other on a single tensor: blocks, then the neck.
        decoder: Module path of the two-way transformer.
        two_way_blocks: Its blocks.
        final_attention: Module path of the decoder's last token→image attention.
    """

    linears: tuple[LinearSite, ...]
    attentions: tuple[AttentionSite, ...]
    encoder_stages: tuple[str, ...]
    decoder: str
    two_way_blocks: tuple[TwoWayBlock, ...]
    final_attention: str
    activation_names: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        names = [site.input for site in self.linears]
        names += [site.operand(which) for site in self.attentions for which in OPERANDS]
        object.__setattr__(self, "activation_names", tuple(names))

    def in_decoder(self, path: str) -> bool:
        """Whether a module path lies in the decoder's transformer."""
        return path == self.decoder or path.startswith(self.decoder + ".")

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a bit setting can match: weights (a layer's path) and activation sites."""
        return tuple(site.name for site in self.linears) + self.activation_names


def find_sites(model: SamModel) -> Sites:
    """The sites of a SAM.

    Args:
        model: A float or quantized ``SamModel``.

    Raises:
        CheckpointError: The model is not laid out as a SAM.
    """
    if not isinstance(model, SamModel):
        raise CheckpointError(f"{type(model).__name__} is not supported; carsam quantizes transformers' SamModel.")
    blocks = [f"{ENCODER}.layers.{i}" for i in range(len(model.vision_encoder.layers))]
    transformer = f"{DECODER}.transformer"
    two_way = [TwoWayBlock(f"{transformer}.layers.{i}") for i in range(len(model.mask_decoder.transformer.layers))]
    final = f"{transformer}.final_attn_token_to_image"

    attentions = [AttentionSite(f"{block}.attn", fused=True) for block in blocks]
    for block in two_way:
        attentions += [
            AttentionSite(name, fused=False)
            for name in (block.self_attention, block.token_to_image, block.image_to_token)
        ]
    attentions.append(AttentionSite(final, fused=False))

    linears = []
    for block in blocks:
        linears += [f"{block}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")]
    linears += [f"{ENCODER}.neck.conv1", f"{ENCODER}.neck.conv2"]
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    for block in two_way:
        linears += [f"{block.self_attention}.{part}" for part in projections]
        linears += [f"{block.token_to_image}.{part}" for part in projections]
        linears += [f"{block.mlp}.lin1", f"{block.mlp}.lin2"]
        linears += [f"{block.image_to_token}.{part}" for part in projections]
    linears += [f"{final}.{part}" for part in projections]

    modules = dict(model.named_modules())
    missing = [name for name in linears + [site.name for site in attentions] if name not in modules]
    if missing or not linears:
        raise CheckpointError(f"this SamModel has no module {missing[:3]}; its layout is not one that carsam knows.")
    return Sites(
        linears=tuple(LinearSite(name) for name in linears),
        attentions=tuple(attentions),
        encoder_stages=(*blocks, f"{ENCODER}.neck"),
        decoder=transformer,
        two_way_blocks=tuple(two_way),
        final_attention=final,
    )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` where ``name`` stands in ``model``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
