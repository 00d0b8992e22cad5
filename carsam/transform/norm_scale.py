"""Channels of a norm scaled and moved towards the layer that alone reads it (METHOD.md, 9).

SmoothQuant (arXiv 2211.10438) divides channels of the input and multiplies the weight's columns; Outlier Suppression+
(arXiv 2304.09145) moves each channel by its middle first. Both are folded into the norm and the layer. Zeros that are
padded in after the norm do not move with it, so there a move is refused; a scale leaves zeros as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carsam.models.sites import Sites
from carsam.transform.operands import Refused, divide_columns
from carsam.transform.statistics import ChannelStatistics

LEAST_SCALE, MOST_SCALE = 0.05, 20.0


def smoothing(inputs: ChannelStatistics, weight: Tensor, strength: float, *, centred: bool) -> Tensor:
    """By what each channel of a layer's input is divided: reach^a / max|W column|^(1 − a), geometric mean 1.

    Args:
        inputs: Statistics of the layer's input.
        weight: (out, in, ...).
        strength: a; 0.5 shares what stands out between input and weight, 1 leaves it to the weight.
        centred: The input will be moved to the middle of each channel's range first.

    Returns:
        (in,) float64, within [1/20, 20].
    """
    reach = (inputs.high - inputs.low) / 2 if centred else inputs.reach
    columns = weight.abs().transpose(0, 1).flatten(1).amax(1)
    logs = strength * reach.double().clamp(min=1e-6).log() - (1 - strength) * columns.double().clamp(min=1e-6).log()
    return (logs - logs.mean()).exp().clamp(LEAST_SCALE, MOST_SCALE)


@torch.no_grad()
def scale_norm(model: nn.Module, norm: str, layer: str, factor: Tensor) -> None:
    """The norm gives x / factor, and the layer's columns are multiplied by ``factor`` (channels,), positive."""
    module = model.get_submodule(norm)
    module.weight.div_(factor.to(module.weight))
    module.bias.div_(factor.to(module.bias))
    divide_columns(model.get_submodule(layer), 1 / factor)


@torch.no_grad()
def shift_norm(model: nn.Module, sites: Sites, norm: str, layer: str, offset: Tensor) -> None:
    """The norm gives x − offset, and the layer's bias takes W · offset.

    Args:
        model: Float model; changed in place.
        sites: Its sites.
        norm, layer: One of ``sites.readers``.
        offset: (channels,).

    Raises:
        Refused: Zeros are padded in between norm and layer, or the layer has no bias or is a convolution that pads.
    """
    module, reader = model.get_submodule(norm), model.get_submodule(layer)
    if layer in sites.padded:
        raise Refused(
            f"a shift of {norm} is not exact: its output is padded with zeros before {layer} reads it, and zeros do "
            "not move with it."
        )
    if not isinstance(reader, nn.Linear) or reader.bias is None:
        raise Refused(f"a shift of {norm} needs a bias in {layer}, and no padding of its own there.")
    module.bias.sub_(offset.to(module.bias))
    reader.bias.add_((reader.weight.double() @ offset.double().to(reader.weight.device)).to(reader.bias.dtype))
