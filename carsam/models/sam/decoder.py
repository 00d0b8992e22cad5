"""SAM's two-way mask decoder: what is quantized in it, its stages and its units. Families with that decoder share this.

A block is self-attention over the prompt tokens, then the coupled pair: token→image attention with the MLP, and
image→token attention (METHOD.md, 8). After the blocks comes one more token→image attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from carsam.calibrate.capture import capture_call, tensors_only
from carsam.models.family import Stage, Tensors
from carsam.models.sites import MLP_IN, MLP_OUT, PROJECTION, AttentionSite, LayerSite, Moment, Projection
from carsam.reconstruct.units import Unit

if TYPE_CHECKING:
    from carsam.prompts.calibration import CalibrationImage

MASK_DECODER = "mask_decoder"
TRANSFORMER = f"{MASK_DECODER}.transformer"
FINAL = f"{TRANSFORMER}.final_attn_token_to_image"


@dataclass(frozen=True)
class TwoWayBlock:
    """A decoder block: self-attention, then the coupled pair token→image (with MLP) and image→token.

    Attributes:
        name: Module path.
        output: Name of the Linear after PV in its attentions.
        mlp_layers: Names of the MLP's two Linears.
    """

    name: str
    output: str = "out_proj"
    mlp_layers: tuple[str, str] = ("lin1", "lin2")

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
    def parts(self) -> tuple[str, str, str, str]:
        """Attentions and MLP in execution order; the norm after part i is ``layer_norm{i + 1}``."""
        return self.self_attention, self.token_to_image, self.mlp, self.image_to_token

    def norm(self, part: int) -> str:
        """Module path of the norm after the residual of a part, counted from 0."""
        return f"{self.name}.layer_norm{part + 1}"


def two_way_blocks(model: nn.Module, block: Callable[[str], TwoWayBlock] = TwoWayBlock) -> tuple[TwoWayBlock, ...]:
    """The blocks of a model's decoder."""
    return tuple(block(f"{TRANSFORMER}.layers.{i}") for i in range(len(model.get_submodule(TRANSFORMER).layers)))


def attention_site(name: str, output: str = "out_proj") -> AttentionSite:
    """An attention of the decoder: three projections, two streams."""
    projections = (Projection(f"{name}.{part}") for part in ("q_proj", "k_proj", "v_proj"))
    return AttentionSite(name, *projections, output=f"{name}.{output}", coupled=True)


def decoder_attentions(blocks: tuple[TwoWayBlock, ...]) -> list[AttentionSite]:
    """The attentions of the decoder, in execution order."""
    paths = [path for block in blocks for path in (block.self_attention, block.token_to_image, block.image_to_token)]
    return [attention_site(path, blocks[0].output) for path in (*paths, FINAL)]


def decoder_layers(blocks: tuple[TwoWayBlock, ...]) -> list[LayerSite]:
    """The quantized layers of the decoder, in execution order."""

    def attention(path: str) -> list[LayerSite]:
        projections = [LayerSite(f"{path}.{part}", PROJECTION) for part in ("q_proj", "k_proj", "v_proj")]
        return [*projections, LayerSite(f"{path}.{blocks[0].output}")]

    layers = []
    for block in blocks:
        layers += attention(block.self_attention) + attention(block.token_to_image)
        layers += [LayerSite(f"{block.mlp}.{name}", role) for name, role in zip(block.mlp_layers, (MLP_IN, MLP_OUT))]
        layers += attention(block.image_to_token)
    return layers + attention(FINAL)


def heads(model: nn.Module) -> tuple[str, ...]:
    """Linears behind the transformer, which stay in floating point: what turns tokens into masks and predicted IoU.

    The upscaling stays as well; its transposed convolutions have their output channels in the second dimension.
    """
    decoder = model.get_submodule(MASK_DECODER)
    return tuple(
        f"{MASK_DECODER}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("transformer.")
    )


def moments(blocks: tuple[TwoWayBlock, ...]) -> tuple[Moment, ...]:
    """The decoder's parts with the norms after their residuals, in execution order."""
    found = [Moment(part, block.norm(i)) for block in blocks for i, part in enumerate(block.parts)]
    return (*found, Moment(FINAL, f"{TRANSFORMER}.layer_norm_final_attn"))


def neighbours(blocks: tuple[TwoWayBlock, ...]) -> tuple[tuple[str, str], ...]:
    """The two cross-attentions of a block, and across blocks what reads the image that the neighbour wrote."""
    pairs = []
    readers = [block.token_to_image for block in blocks[1:]] + [FINAL]
    for block, reader in zip(blocks, readers):
        pairs += [
            (block.token_to_image, block.image_to_token),
            (block.image_to_token, block.token_to_image),
            (reader, block.image_to_token),
        ]
    return tuple(pairs)


def focus(blocks: tuple[TwoWayBlock, ...]) -> tuple[str, ...]:
    """The token→image attentions."""
    return (*(block.token_to_image for block in blocks), FINAL)


def decoder_stages(blocks: tuple[TwoWayBlock, ...], granularity: str) -> tuple[Stage, ...]:
    """Its blocks and the final attention; or the whole transformer, where that is the unit."""
    if granularity == "decoder":
        return (Stage(TRANSFORMER, _runner(TRANSFORMER)),)
    stages = [
        Stage(block.name, _runner(block.name), _to_final if block == blocks[-1] else _to_next_block) for block in blocks
    ]
    return (*stages, Stage(FINAL, _runner(FINAL)))


def enter_decoder(
    blocks: tuple[TwoWayBlock, ...],
    granularity: str,
    arguments_of: Callable[[nn.Module, Tensor, Tensor], Tensors],
) -> Callable:
    """The inputs of the decoder's first stage from the encoder's outputs and an image's boxes.

    Args:
        blocks: The decoder's.
        granularity: Of its stages.
        arguments_of: Gives the transformer's arguments; :func:`decoder_input` for SAM.
    """

    def enter(model: nn.Module, before: Tensors, image: CalibrationImage) -> Tensors:
        embedding = before["hidden_states"]
        arguments = arguments_of(model, embedding, image.boxes.to(embedding.device))
        return arguments if granularity == "decoder" else first_block_inputs(model, blocks[0].name, arguments)

    return enter


def decoder_units(blocks: tuple[TwoWayBlock, ...], granularity: str) -> list[Unit]:
    """The decoder's units, in execution order; see :meth:`carsam.models.family.Family.units`."""

    def module(path: str, stage: str) -> Unit:
        return Unit(path, (path,), stage, _runner(path), _capture_module(path), outputs=(path,))

    if granularity == "decoder":
        return [module(TRANSFORMER, TRANSFORMER)]
    units = []
    for block in blocks:
        if granularity == "block":
            units.append(module(block.name, block.name))
        elif granularity == "pair":
            units += [module(block.self_attention, block.name), _pair(block)]
        else:
            units += [module(path, block.name) for path in block.parts]
    return [*units, module(FINAL, FINAL)]


def _pair(block: TwoWayBlock) -> Unit:
    """JCAR's unit: the second half of a block, which has no module of its own."""

    def run(model: nn.Module, inputs: Tensors) -> Tensors:
        return run_pair(model.get_submodule(block.name), **inputs)

    def capture(model: nn.Module, run_stage: Callable[[], object]) -> Tensors:
        module = model.get_submodule(block.name)
        _, call = capture_call(module, run_stage)
        # The token side enters with what the norm after self-attention gives.
        queries = capture_call(model.get_submodule(block.norm(0)), lambda: module(**call), output=True)
        return {
            "queries": queries,
            "keys": call["keys"],
            "query_pe": call["query_point_embedding"],
            "key_pe": call["key_point_embedding"],
        }

    scope = (block.token_to_image, block.mlp, block.image_to_token)
    outputs = (block.norm(2), block.norm(3))
    return Unit(f"{block.name}.pair", scope, block.name, run, capture, outputs=outputs)


def run_pair(block: nn.Module, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> Tensors:
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
    return {"queries": queries, "keys": block.layer_norm4(keys + attended)}


def _runner(path: str) -> Callable[[nn.Module, Tensors], Tensors]:
    return lambda model, inputs: _run(model.get_submodule(path), inputs)


def _run(module: nn.Module, inputs: Tensors) -> Tensors:
    """Runs a module of the decoder; its outputs that the rest of the network reads."""
    arguments = dict(inputs)
    if "attention_similarity" in inspect.signature(module.forward).parameters:
        arguments.setdefault("attention_similarity", None)
    result = module(**arguments)
    if isinstance(result, Tensor):
        return {"queries": result}
    # Attentions return (output, attention map), blocks and transformer (tokens, image, last attention output).
    return dict(zip(("queries", "keys"), result[: 1 if hasattr(module, "q_proj") else 2]))


def _capture_module(path: str) -> Callable[[nn.Module, Callable[[], object]], Tensors]:
    def capture(model: nn.Module, run_stage: Callable[[], object]) -> Tensors:
        module = model.get_submodule(path)
        args, kwargs = capture_call(module, run_stage)
        return tensors_only(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    return capture


@torch.no_grad()
def decoder_input(model: nn.Module, embedding: Tensor, boxes: Tensor) -> Tensors:
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

    return transformer_arguments(
        model,
        image_embeddings=embedding,
        image_positional_embeddings=model.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )


@torch.no_grad()
def transformer_arguments(model: nn.Module, **decoder_arguments: Any) -> Tensors:
    """Arguments of the two-way transformer when the decoder is called on the prompts of one image.

    Args:
        model: The model.
        **decoder_arguments: Of its mask decoder, but for ``multimask_output``.

    Returns:
        As :func:`decoder_input`.
    """
    decode = partial(model.mask_decoder, **decoder_arguments, multimask_output=False)
    _, call = capture_call(model.mask_decoder.transformer, decode)
    # From (1, prompts, ...) to (prompts, 1, ...): the same computation, but prompts of several images can be stacked.
    call["point_embeddings"] = call["point_embeddings"].transpose(0, 1)
    return tensors_only(call)


def first_block_inputs(model: nn.Module, block: str, arguments: Tensors) -> Tensors:
    """Arguments of the first decoder block, from those of the transformer."""
    transformer = model.get_submodule(TRANSFORMER)
    _, call = capture_call(model.get_submodule(block), lambda: transformer(attention_similarity=None, **arguments))
    return tensors_only(call)


# The transformer itself adds nothing between its blocks but positional embeddings.


def _to_next_block(_model: nn.Module, inputs: Tensors, outputs: Tensors) -> Tensors:
    return {**inputs, "queries": outputs["queries"], "keys": outputs["keys"]}


def _to_final(_model: nn.Module, inputs: Tensors, outputs: Tensors) -> Tensors:
    key = outputs["keys"] + inputs["key_point_embedding"]
    return {"query": outputs["queries"] + inputs["query_point_embedding"], "key": key, "value": outputs["keys"]}
