"""SAM's image encoder, a plain ViT: what is quantized in it, its stages and its units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionLayer

from carsam.calibrate.capture import capture_call
from carsam.models.attention import CHUNK_ELEMENTS, MatMulQuantizers
from carsam.models.family import Stage, Tensors
from carsam.models.sam.attention import QuantizedVisionAttention
from carsam.models.sites import (
    MLP_IN,
    MLP_OUT,
    PROJECTION,
    AttentionSite,
    LayerSite,
    Projection,
    ResidualStream,
    replace_module,
)
from carsam.quantizers import ActivationQuantizer, UniformSoftmax
from carsam.reconstruct.units import Unit

if TYPE_CHECKING:
    from carsam.prompts.calibration import CalibrationImage

ENCODER = "vision_encoder"
NECK = f"{ENCODER}.neck"


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the encoder's blocks."""
    return tuple(f"{ENCODER}.layers.{i}" for i in range(len(model.get_submodule(ENCODER).layers)))


def encoder_attentions(model: nn.Module) -> list[AttentionSite]:
    """One attention a block: a Linear for queries, keys and values, relative positions."""
    sites = []
    for block in blocks(model):
        name = f"{block}.attn"
        positions = ("rel_pos_h", "rel_pos_w") if model.get_submodule(name).use_rel_pos else ()
        projections = (Projection(f"{name}.qkv", part, 3) for part in range(3))
        sites.append(AttentionSite(name, *projections, output=f"{name}.proj", positions=positions))
    return sites


def encoder_layers(model: nn.Module) -> list[LayerSite]:
    """Linears of the blocks, convolutions of the neck."""
    roles = {"attn.qkv": PROJECTION, "attn.proj": "", "mlp.lin1": MLP_IN, "mlp.lin2": MLP_OUT}
    layers = [LayerSite(f"{block}.{part}", role) for block in blocks(model) for part, role in roles.items()]
    return [*layers, *neck_layers()]


def neck_layers() -> list[LayerSite]:
    """The two convolutions of the neck."""
    return [LayerSite(f"{NECK}.conv1"), LayerSite(f"{NECK}.conv2")]


def readers(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Both norms of a block, each with the Linear behind it."""
    pairs = (("layer_norm1", "attn.qkv"), ("layer_norm2", "mlp.lin1"))
    return tuple((f"{block}.{norm}", f"{block}.{layer}") for block in blocks(model) for norm, layer in pairs)


def padded(model: nn.Module) -> tuple[str, ...]:
    """Projections of blocks whose windows do not divide the grid: SAM pads the last ones with zeros after the norm."""
    vision = model.config.vision_config
    grid = vision.image_size // vision.patch_size
    # Families that derive from this one may have blocks without windows.
    sides = {block: getattr(model.get_submodule(block), "window_size", 0) for block in blocks(model)}
    return tuple(f"{block}.attn.qkv" for block, side in sides.items() if side and grid % side)


def residual(model: nn.Module) -> ResidualStream | str:
    """The stream through the blocks: written by the embeddings and by each half of a block, read by norms and neck.

    The reason why it may not be turned where a family that derives from this one has other blocks.
    """
    written = [f"{block}.{layer}" for block in blocks(model) for layer in ("attn.proj", "mlp.lin2")]
    modules = dict(model.named_modules())
    missing = [path for path in (f"{ENCODER}.patch_embed.projection", *written) if path not in modules]
    if missing:
        return f"which layers write to the stream of its encoder is not known: there is no {missing[0]}"
    tables = () if model.get_submodule(ENCODER).pos_embed is None else (f"{ENCODER}.pos_embed",)
    return ResidualStream((f"{ENCODER}.patch_embed.projection", *written), tables, (f"{NECK}.conv1",))


def attend_in_pieces(model: nn.Module) -> None:
    """Gives blocks that attend over a large map the attention that never holds all of its scores.

    transformers' own makes several tensors of 12 × 4,096 × 4,096 scores (0.8 GB) at once for ViT-B at 1024 px, which
    takes most of the block's time.
    """
    # Families that derive from this one have other blocks.
    for block, module in list(model.named_modules()):
        if not isinstance(module, SamVisionLayer) or module.window_size or type(module.attn) is not SamVisionAttention:
            continue
        vision = model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2
        if module.attn.num_attention_heads * tokens**2 > CHUNK_ELEMENTS:
            matmul = MatMulQuantizers(*(ActivationQuantizer(16) for _ in range(3)), UniformSoftmax(16))
            replace_module(model, f"{block}.attn", QuantizedVisionAttention(module.attn, matmul))


def chain(path: str) -> Stage:
    """A stage that takes one tensor to one tensor."""
    return Stage(path, partial(_run, path))


def stage_units(stages: tuple[Stage, ...]) -> list[Unit]:
    """One unit a stage: the blocks (channels last), then the neck (channels first)."""
    return [
        Unit(
            stage.name,
            (stage.name,),
            stage.name,
            stage.run,
            partial(_capture, stage.name),
            channel_dim=1 if stage.name == NECK else -1,
        )
        for stage in stages
    ]


@torch.no_grad()
def enter_encoder(model: nn.Module, _before: Tensors, image: CalibrationImage) -> Tensors:
    """Input of the first block: patch and position embeddings, which stay in floating point."""
    encoder = model.get_submodule(ENCODER)
    hidden = encoder.patch_embed(image.pixel_values.to(model.device))
    return {"hidden_states": hidden if encoder.pos_embed is None else hidden + encoder.pos_embed}


def _run(path: str, model: nn.Module, inputs: Tensors) -> Tensors:
    result = model.get_submodule(path)(**inputs)
    return {"hidden_states": result if isinstance(result, Tensor) else result[0]}


def _capture(path: str, model: nn.Module, run_stage: Callable[[], object]) -> Tensors:
    args, kwargs = capture_call(model.get_submodule(path), run_stage)
    return {"hidden_states": args[0] if args else kwargs["hidden_states"]}


def valid_queries(block: nn.Module, height: int, width: int) -> Tensor | None:
    """Which queries of a block's windows lie on the image grid: SAM pads the last windows with zeros.

    Args:
        block: An encoder block, or the neck.
        height, width: Size of the grid.

    Returns:
        (windows, queries) bool; None where there are no windows.
    """
    side = getattr(block, "window_size", 0)
    if side == 0:
        return None
    windows, _ = block.window_partition(torch.ones(1, height, width, 1), side)
    return windows.flatten(1) > 0
