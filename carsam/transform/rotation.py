"""Orthogonal maps: Hadamard matrices, random rotations, and the rotation of an encoder's residual stream.

A rotation spreads what stands out in one channel over all of them, so that one grid for a tensor is wasted less
(QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). LayerNorm subtracts the mean over channels, so a rotation of
the stream must leave the vector of ones where it is: then norm(x R) = norm(x) R without weight and bias, and nothing
has to be centred first. With the norm's weight w and bias b, the layer after it reads w ⊙ n + b of the normalised n.
After the rotation the norm gives n R + β with β = (b / w) R, and the layer takes W diag(w) R instead of W. Zeros that
are padded in after the norm stay zeros and give what they gave. Where there are none, the bias goes into the layer's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carsam.models.sites import ResidualStream, Sites
from carsam.transform.operands import Refused

# A norm's bias is divided by its weight; one smaller than this share of the largest is not divided by.
LEAST_WEIGHT = 1e-4


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix (size, size) whose entries are all as large as can be, float64.

    Sylvester's construction where ``size`` is a power of two. Else its odd factor is a cosine basis (DCT-II), the rest
    Sylvester's: their Kronecker product is orthogonal too.
    """
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / power**0.5
    odd = size // power
    if odd == 1:
        return matrix
    steps = torch.arange(odd, dtype=torch.float64)
    cosines = torch.cos(torch.pi / odd * (steps[None] + 0.5) * steps[:, None]) * (2 / odd) ** 0.5
    cosines[0] /= 2**0.5
    return torch.kron(matrix, cosines)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix (size, size), uniformly distributed, float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def randomised_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix with random signs of its rows (QuIP#, arXiv 2402.04396): no fixed pattern meets its own."""
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return signs[:, None] * hadamard(size)


def keeping_ones(rotation: Tensor) -> Tensor:
    """An orthogonal (n + 1, n + 1) that leaves the vector of ones where it is and turns the rest by ``rotation``.

    Args:
        rotation: Orthogonal (n, n).
    """
    size = len(rotation) + 1
    # The reflection that exchanges the first axis and the normalised vector of ones.
    normal = torch.full((size,), size**-0.5, dtype=torch.float64)
    normal[0] -= 1
    length = normal.square().sum()
    reflection = torch.eye(size, dtype=torch.float64)
    if length > 0:
        reflection -= 2 / length * torch.outer(normal, normal)
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = rotation
    return reflection @ inner @ reflection


@torch.no_grad()
def rotate_residual(model: nn.Module, sites: Sites, rotation: Tensor) -> None:
    """x ← x R for the stream through the image encoder's blocks; every norm's weight goes into the layer behind it.

    Args:
        model: Float model; changed in place.
        sites: Its sites, with the stream and the norms that read it.
        rotation: R, orthogonal (channels, channels) with 1 R = 1.

    Raises:
        Refused: The family's table forbids it, or a norm's bias cannot pass through its weight.
    """
    stream = sites.residual
    if not isinstance(stream, ResidualStream):
        raise Refused(f"the stream of the image encoder cannot be rotated, because {stream}.")
    rotation = rotation.double()
    norms = [(norm, layer) for norm, layer in sites.readers if not sites.in_decoder(layer)]
    for norm, layer in norms:  # all of them, before anything is changed
        _check_norm(model, norm, padded=layer in sites.padded)
    for path in stream.writers:
        layer = model.get_submodule(path)
        layer.weight.copy_(_rows_turned(layer.weight, rotation))
        if layer.bias is not None:
            layer.bias.copy_(_last_turned(layer.bias, rotation))
    for path in stream.tables:
        table = model.get_parameter(path)
        table.copy_(_last_turned(table, rotation))
    for path in stream.readers:
        layer = model.get_submodule(path)
        layer.weight.copy_(_columns_turned(layer.weight, rotation))
    for norm, layer in norms:
        _turn_reader(model.get_submodule(norm), model.get_submodule(layer), rotation, padded=layer in sites.padded)


def _check_norm(model: nn.Module, path: str, *, padded: bool) -> None:
    """A layer that reads padded zeros cannot take the norm's bias; then the weight must be invertible."""
    norm = model.get_submodule(path)
    weight, bias = norm.weight.abs(), norm.bias.abs()
    if padded and bool(((weight < LEAST_WEIGHT * weight.max()) & (bias > 0)).any()):
        raise Refused(
            f"the stream of the image encoder cannot be rotated: {path} has a weight near zero in a channel with a "
            "bias, and zeros are padded in behind it, so that its bias can be moved neither way."
        )


def _turn_reader(norm: nn.Module, layer: nn.Module, rotation: Tensor, *, padded: bool) -> None:
    weight, bias = norm.weight.double(), norm.bias.double()
    if padded:
        shift = torch.where(bias == 0, 0.0, bias / weight)
        norm.bias.copy_(_last_turned(shift, rotation).to(norm.bias.dtype))
    else:
        layer.bias.add_((layer.weight.double() @ bias).to(layer.bias.dtype))
        norm.bias.zero_()
    layer.weight.copy_(_columns_turned(layer.weight.double() * weight, rotation))
    norm.weight.fill_(1.0)


def _last_turned(values: Tensor, rotation: Tensor) -> Tensor:
    """(..., channels) times R."""
    return (values.double() @ rotation.to(values.device)).to(values.dtype)


def _rows_turned(weight: Tensor, rotation: Tensor) -> Tensor:
    """A layer's weight (out, ...) whose output is multiplied by R: y R = x Wᵀ R."""
    return (rotation.to(weight.device).T @ weight.double().flatten(1)).view(weight.shape).to(weight.dtype)


def _columns_turned(weight: Tensor, rotation: Tensor) -> Tensor:
    """A layer's weight (out, in, ...) whose input was multiplied by R: W R, for x Wᵀ = (x R) (W R)ᵀ."""
    return torch.einsum("oi...,ij->oj...", weight.double(), rotation.to(weight.device)).to(weight.dtype)
