"""What is reconstructed at a time: units, how their inputs are captured and how they are run.

A unit maps named input tensors, each (n, ...) over blocks of the image or prompts, to a tuple of output tensors. Most
units are modules; JCAR's pair is the second half of a decoder block and has no module of its own (METHOD.md, 8).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import SamModel

from carsam.calibrate.capture import capture_call, tensors_only
from carsam.errors import ConfigError
from carsam.models.sites import Sites, TwoWayBlock

GRANULARITIES = ("module", "pair", "block", "decoder")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Unit:
    """A part of the model that is reconstructed as one.

    Attributes:
        name: Unique name, also of its saved state.
        scope: Module paths whose layers and activation quantizers belong to it.
        stage: Module path of the stage it lies in: an encoder stage, a decoder block, the final attention, or the whole
            transformer where that is the unit.
        block: For JCAR's pair, the decoder block; None for a unit that is a module (``scope[0]``).
        channel_dim: The outputs' channel dimension.
    """

    name: str
    scope: tuple[str, ...]
    stage: str
    block: TwoWayBlock | None = None
    channel_dim: int = -1

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The unit's modules in ``model``."""
        return [model.get_submodule(path) for path in self.scope]


def encoder_units(sites: Sites) -> list[Unit]:
    """One unit per encoder block, and the neck."""
    *blocks, neck = sites.encoder_stages
    return [*(Unit(block, (block,), block) for block in blocks), Unit(neck, (neck,), neck, channel_dim=1)]


def decoder_units(sites: Sites, granularity: str) -> list[Unit]:
    """The decoder's units, in execution order.

    Args:
        sites: The model's sites.
        granularity: ``module`` (each attention, each MLP), ``pair`` (JCAR: token→image attention, MLP and image→token
            attention of a block as one), ``block`` (self-attention too) or ``decoder`` (the whole transformer).

    Raises:
        ConfigError: The granularity is unknown.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"unknown granularity {granularity!r}; choose from {', '.join(GRANULARITIES)}.")

    def whole(path: str) -> Unit:
        return Unit(path, (path,), path)

    if granularity == "decoder":
        return [whole(sites.decoder)]
    units = []
    for block in sites.two_way_blocks:
        if granularity == "block":
            units.append(whole(block.name))
            continue
        if granularity == "pair":
            pair = (block.token_to_image, block.mlp, block.image_to_token)
            parts = [(block.self_attention, (block.self_attention,), None), (f"{block.name}.pair", pair, block)]
        else:
            paths = (block.self_attention, block.token_to_image, block.mlp, block.image_to_token)
            parts = [(path, (path,), None) for path in paths]
        units += [Unit(name, scope, block.name, of) for name, scope, of in parts]
    return [*units, whole(sites.final_attention)]


def check_cover(units: list[Unit], sites: Sites) -> None:
    """Every site lies in exactly one unit; anything else would leave a layer in floating point, in silence."""
    for site in [site.name for site in sites.linears] + [site.name for site in sites.attentions]:
        owners = [u.name for u in units if any(site == path or site.startswith(path + ".") for path in u.scope)]
        assert len(owners) == 1, f"{site} lies in the units {owners}"


def run_pair(
    block: nn.Module, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
) -> tuple[Tensor, Tensor]:
    """The second half of ``SamTwoWayAttentionBlock.forward``: all that follows the norm after self-attention.

    Args:
        block: The decoder block.
        queries: (n, 1, tokens, dim) tokens after the first norm.
        keys: (n, 1, height · width, dim) image embedding.
        query_pe, key_pe: Their positional embeddings.

    Returns:
        Tokens and image embedding after the block.
    """
    key = keys + key_pe
    attended, _ = block.cross_attn_token_to_image(query=queries + query_pe, key=key, value=keys)
    queries = block.layer_norm2(queries + attended)
    queries = block.layer_norm3(queries + block.mlp(queries))
    attended, _ = block.cross_attn_image_to_token(query=key, key=queries + query_pe, value=queries)
    return queries, block.layer_norm4(keys + attended)


def run_unit(model: nn.Module, unit: Unit, inputs: Tensors) -> tuple[Tensor, ...]:
    """Runs a unit on its inputs; the outputs that the rest of the network reads."""
    if unit.block is not None:
        return run_pair(model.get_submodule(unit.block.name), **inputs)
    return run_module(model, unit.scope[0], inputs)


def run_module(model: nn.Module, path: str, inputs: Tensors) -> tuple[Tensor, ...]:
    """Runs a stage or a unit that is a module."""
    module = model.get_submodule(path)
    arguments = dict(inputs)
    if "attention_similarity" in inspect.signature(module.forward).parameters:
        arguments.setdefault("attention_similarity", None)
    result = module(**arguments)
    if isinstance(result, Tensor):
        return (result,)
    # Attentions return (output, attention map), decoder blocks (tokens, image, last attention output): the rest of the
    # network reads only what comes first.
    keep = 1 if hasattr(module, "out_proj") else 2
    return tuple(result[:keep])


def capture_unit(model: nn.Module, unit: Unit, run_stage: Callable[[], object]) -> Tensors:
    """The inputs with which ``run_stage()``, a pass through the unit's stage, reaches it."""
    if unit.block is None:
        module = model.get_submodule(unit.scope[0])
        args, kwargs = capture_call(module, run_stage)
        return tensors_only(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    block = model.get_submodule(unit.block.name)
    _, call = capture_call(block, run_stage)
    queries = capture_call(model.get_submodule(unit.block.pair_entry), lambda: block(**call), output=True)
    return {
        "queries": queries,
        "keys": call["keys"],
        "query_pe": call["query_point_embedding"],
        "key_pe": call["key_point_embedding"],
    }


@torch.no_grad()
def first_stage_input(model: SamModel, pixel_values: Tensor) -> Tensor:
    """Input of the first encoder block: patch and position embeddings, which stay in floating point."""
    hidden = model.vision_encoder.patch_embed(pixel_values)
    return hidden if model.vision_encoder.pos_embed is None else hidden + model.vision_encoder.pos_embed


@torch.no_grad()
def decoder_input(model: SamModel, embedding: Tensor, boxes: Tensor) -> Tensors:
    """Arguments of the two-way transformer for the box prompts of one image, prompts along the first dimension.

    Args:
        model: The model; its prompt encoder stays in floating point.
        embedding: (1, dim, h, w) image embedding.
        boxes: (prompts, 4) XYXY in input pixels.

    Returns:
        ``point_embeddings`` (prompts, 1, tokens, dim), ``image_embeddings`` and ``image_positional_embeddings``
        (prompts, dim, h, w).
    """
    sparse, dense = model.prompt_encoder(
        input_points=None, input_labels=None, input_boxes=boxes[None], input_masks=None
    )

    def decode() -> None:
        model.mask_decoder(
            image_embeddings=embedding,
            image_positional_embeddings=model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )

    _, call = capture_call(model.mask_decoder.transformer, decode)
    # From (1, prompts, ...) to (prompts, 1, ...): the same computation, but prompts of several images can be stacked.
    call["point_embeddings"] = call["point_embeddings"].transpose(0, 1)
    return tensors_only(call)


def next_stage_inputs(sites: Sites, stage: str, inputs: Tensors, outputs: tuple[Tensor, ...]) -> Tensors:
    """Inputs of the decoder stage after ``stage``, from its inputs and outputs.

    Stages of the decoder are its blocks and the final attention; the transformer itself adds nothing in between but
    positional embeddings.

    Args:
        sites: The model's sites.
        stage: A block's module path.
        inputs: Its arguments.
        outputs: Tokens and image embedding that it returned.
    """
    queries, keys = outputs
    if stage != sites.two_way_blocks[-1].name:
        return {**inputs, "queries": queries, "keys": keys}
    key = keys + inputs["key_point_embedding"]
    return {"query": queries + inputs["query_point_embedding"], "key": key, "value": keys}


def first_block_inputs(model: SamModel, sites: Sites, arguments: Tensors) -> Tensors:
    """Arguments of the first decoder block, from those of the transformer."""
    transformer = model.get_submodule(sites.decoder)
    block = model.get_submodule(sites.two_way_blocks[0].name)
    _, call = capture_call(block, lambda: transformer(attention_similarity=None, **arguments))
    return tensors_only(call)
