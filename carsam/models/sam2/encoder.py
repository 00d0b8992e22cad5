"""SAM 2's image encoder: Hiera (arXiv 2306.00989) and a feature pyramid; what is quantized, its stages and units.

A chain of blocks over four widths. The first block of a width pools: a Linear and a maximum over 2 × 2 on the
shortcut, the same maximum on the queries. What the last block of each width gives also goes to the pyramid's neck, so
it is handed on along the chain as ``level_0`` (the finest) to ``level_3``.

The embedding of an image is one tensor: the map that memory attention and decoder read, with both high-resolution maps
folded onto its grid (:func:`fold`). ``conv_s0`` and ``conv_s1``, by which the decoder narrows those maps, are part of
it, since they depend on nothing else; the embedding of "no memory" is not, since a video's frames have a memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam2.modeling_sam2 import Sam2VisionNeck

from carsam.calibrate.capture import capture_call
from carsam.models.family import ENCODED, Stage, Tensors
from carsam.models.sites import MLP_IN, MLP_OUT, PROJECTION, AttentionSite, LayerSite, Projection, replace_module
from carsam.reconstruct.units import Unit

if TYPE_CHECKING:
    from carsam.prompts.calibration import CalibrationImage

ENCODER = "vision_encoder"
BACKBONE = f"{ENCODER}.backbone"
NECK = f"{ENCODER}.neck"
LEVEL = "level_{}"


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks by module path, in execution order."""
    return {f"{BACKBONE}.blocks.{index}": block for index, block in enumerate(model.get_submodule(BACKBONE).blocks)}


def encoder_attentions(model: nn.Module) -> list[AttentionSite]:
    """One attention a block: a Linear for queries, keys and values; queries are pooled where the width changes."""
    sites = []
    for path, block in blocks(model).items():
        name = f"{path}.attn"
        projections = (Projection(f"{name}.qkv", part, 3) for part in range(3))
        sites.append(AttentionSite(name, *projections, output=f"{name}.proj", pooled=bool(block.query_stride)))
    return sites


def encoder_layers(model: nn.Module) -> list[LayerSite]:
    """Linears of the blocks, those at a change of width among them; convolutions of the neck."""
    roles = {"attn.qkv": PROJECTION, "attn.proj": "", "mlp.proj_in": MLP_IN, "mlp.proj_out": MLP_OUT}
    layers = []
    for path, block in blocks(model).items():
        if hasattr(block, "proj"):
            layers.append(LayerSite(f"{path}.proj"))
        layers += [LayerSite(f"{path}.{part}", role) for part, role in roles.items()]
    # In the order in which the neck runs them: from the coarsest level to the finest.
    convolutions = len(model.get_submodule(NECK).convs)
    return [*layers, *(LayerSite(f"{NECK}.convs.{index}") for index in range(convolutions))]


def readers(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Both norms of a block, each with the Linear behind it; where the width changes, two layers read the first."""
    pairs = []
    for path, block in blocks(model).items():
        if not hasattr(block, "proj"):
            pairs.append((f"{path}.layer_norm1", f"{path}.attn.qkv"))
        pairs.append((f"{path}.layer_norm2", f"{path}.mlp.proj_in"))
    return tuple(pairs)


def padded(model: nn.Module) -> tuple[str, ...]:
    """Projections of blocks whose windows do not divide the grid: the last are padded with zeros after the norm."""
    grid = model.prompt_encoder.input_image_size // model.get_submodule(BACKBONE).patch_embed.projection.stride[0]
    found = []
    for path, block in blocks(model).items():
        if block.window_size and grid % block.window_size:
            found.append(f"{path}.attn.qkv")
        if block.query_stride:
            grid //= block.query_stride[0]
    return tuple(found)


def stages(paths: tuple[str, ...]) -> tuple[Stage, ...]:
    """The stages of the encoder: its blocks, then the neck."""
    *chain, neck = paths
    found = [Stage(path, partial(_run_block, path), partial(_hand_on, index)) for index, path in enumerate(chain)]
    return (*found, Stage(neck, _run_neck))


def stage_units(stages: tuple[Stage, ...]) -> list[Unit]:
    """One unit a stage: the blocks (channels last), then the neck (channels first)."""
    *chain, neck = stages
    units = [
        Unit(stage.name, (stage.name,), stage.name, stage.run, partial(_capture_block, stage.name), reads=(ENCODED,))
        for stage in chain
    ]
    return [*units, Unit(neck.name, (neck.name,), neck.name, neck.run, _capture_neck, channel_dim=1)]


@torch.no_grad()
def enter_encoder(model: nn.Module, _before: Tensors, image: CalibrationImage) -> Tensors:
    """Input of the first block: patch and position embeddings, which stay in floating point."""
    backbone = model.get_submodule(BACKBONE)
    hidden = backbone.patch_embed(image.pixel_values.to(model.device))
    return {ENCODED: hidden + backbone._get_pos_embed(hidden.shape[1:3])}


def _run_block(path: str, model: nn.Module, inputs: Tensors) -> Tensors:
    return {ENCODED: model.get_submodule(path)(inputs[ENCODED])}


def _hand_on(index: int, model: nn.Module, inputs: Tensors, outputs: Tensors) -> Tensors:
    """What the next stage gets: the levels so far, the one that ends here, and the stream."""
    levels = {name: value for name, value in inputs.items() if name != ENCODED}
    ends = model.get_submodule(BACKBONE).stage_ends
    if index in ends:
        levels[LEVEL.format(ends.index(index))] = outputs[ENCODED]
    # The coarsest level is what the last block gives: the neck reads it from there.
    return levels if index == ends[-1] else {**levels, **outputs}


def _run_neck(model: nn.Module, inputs: Tensors) -> Tensors:
    """The embedding, and both finer maps by themselves: each output of a unit is measured against its own variance.

    Within the embedding alone, theirs are a tenth and a hundredth of the coarse map's, and errors in them went unseen.
    """
    levels = [inputs[LEVEL.format(index)] for index in range(len(inputs))]
    maps, _ = model.get_submodule(NECK)(levels)
    narrowed = narrow(model, maps)
    return {ENCODED: fold(narrowed), "fine": narrowed[1], "finest": narrowed[0]}


def _capture_block(path: str, model: nn.Module, run_stage: Callable[[], object]) -> Tensors:
    args, kwargs = capture_call(model.get_submodule(path), run_stage)
    return {ENCODED: args[0] if args else kwargs[ENCODED]}


def _capture_neck(model: nn.Module, run_stage: Callable[[], object]) -> Tensors:
    args, kwargs = capture_call(model.get_submodule(NECK), run_stage)
    levels = args[0] if args else kwargs[ENCODED]
    return {LEVEL.format(index): level for index, level in enumerate(levels)}


class QuantizedNeck(Sam2VisionNeck):
    """The neck, without its casts to the kind of numbers of a convolution's weight, which are bytes once packed.

    It takes over the modules of a ``Sam2VisionNeck``, so names in a state dict stay what they were.
    """

    def __init__(self, source: Sam2VisionNeck):
        nn.Module.__init__(self)
        for name in ("config", "convs", "position_encoding", "fpn_top_down_levels"):
            setattr(self, name, getattr(source, name))

    def forward(self, hidden_states: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Levels (B, h, w, C), the finest first, to maps (B, C, h, w) and their positions, the coarsest first."""
        maps: list[Tensor] = []
        coarsest = len(self.convs) - 1
        for level in range(coarsest, -1, -1):
            found = self.convs[coarsest - level](hidden_states[level].permute(0, 3, 1, 2))
            if level in self.fpn_top_down_levels and level != coarsest:
                found = found + F.interpolate(maps[-1], scale_factor=2.0, mode="nearest")
            maps.append(found)
        positions = tuple(self.position_encoding(each.shape, each.device, each.dtype).to(each.dtype) for each in maps)
        return tuple(maps), positions


def adapt_neck(model: nn.Module) -> None:
    """Puts :class:`QuantizedNeck` in the neck's place."""
    neck = model.get_submodule(NECK)
    if not isinstance(neck, QuantizedNeck):
        replace_module(model, NECK, QuantizedNeck(neck))


def narrow(model: nn.Module, maps: tuple[Tensor, ...]) -> list[Tensor]:
    """The maps that decoder and memory read, from those of the neck.

    Args:
        model: The model.
        maps: (B, C, h, w) each, from the coarsest level to the finest; the coarsest served only the next one.

    Returns:
        ``(B, C / 8, 4 h, 4 w)``, ``(B, C / 4, 2 h, 2 w)`` and ``(B, C, h, w)``.
    """
    finest, fine, embedding = maps[-model.num_feature_levels :][::-1]
    decoder = model.mask_decoder
    return [decoder.conv_s0(finest), decoder.conv_s1(fine), embedding]


def fold(maps: list[Tensor]) -> Tensor:
    """The maps of an image as one tensor: pixels of the finer ones become channels.

    Args:
        maps: As :func:`narrow` gives them.

    Returns:
        ``(B, 4 C, h, w)``: first the C channels of the embedding itself, then those of the maps of twice and four times
        the resolution.
    """
    finest, fine, embedding = maps
    return torch.cat([embedding, F.pixel_unshuffle(fine, 2), F.pixel_unshuffle(finest, 4)], dim=1)


def unfold(folded: Tensor) -> list[Tensor]:
    """The inverse of :func:`fold`: every map as it was."""
    # C, 4 · C / 4 and 16 · C / 8 channels.
    embedding, fine, finest = folded.split([folded.shape[1] // 4, folded.shape[1] // 4, folded.shape[1] // 2], dim=1)
    return [F.pixel_shuffle(finest, 4), F.pixel_shuffle(fine, 2), embedding]


class ImageEncoder(nn.Module):
    """All that decides the embedding of given pixels; modules of the model, not copies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vision_encoder = model.vision_encoder
        self.conv_s0, self.conv_s1 = model.mask_decoder.conv_s0, model.mask_decoder.conv_s1
        self.config = model.config.vision_config


def valid_queries(block: nn.Module, height: int, width: int) -> Tensor | None:
    """Which queries of a block's windows lie on the image grid: the last windows are padded with zeros.

    Args:
        block: An encoder block, or the neck.
        height, width: Size of the grid before the block.

    Returns:
        (windows, queries) bool; None where there are no windows.
    """
    side = getattr(block, "window_size", 0)
    if side == 0:
        return None
    inside = F.pad(torch.ones(1, 1, height, width), (0, -width % side, 0, -height % side))
    if block.query_stride:
        # A pooled query stays where all of its pixels are inside; windows shrink with the grid.
        inside = F.avg_pool2d(inside, block.query_stride).floor()
        side //= block.query_stride[0]
    windows = F.unfold(inside, side, stride=side)
    return windows[0].T > 0
