"""Maps of heads in closed form: what 4-bit steps of Q and K, or of V and the output projection, lose least by.

A step for a whole tensor is as large as its largest channel asks for. With errors of the steps that are alike in all
channels, Q and K lose ‖ΔQ Kᵀ‖² + ‖Q ΔKᵀ‖² ∝ s_Q² tr Σ_K + s_K² tr Σ_Q, where Q M has the second moments Mᵀ Σ_Q M and
K M⁻ᵀ has M⁻¹ Σ_K M⁻ᵀ. tr(Mᵀ Σ_Q M) · tr(M⁻¹ Σ_K M⁻ᵀ) is never below (tr (Σ_Q Σ_K)^½)², which it reaches where both are
the same matrix: M Mᵀ = Σ_Q⁻¹ # Σ_K, the geometric mean of positive matrices. The balance of METHOD.md, 9 is its
diagonal. A rotation behind it changes neither trace and gives all channels one size, so that the steps are no larger
than they need to be: the shared matrix's own axes, then a Hadamard matrix. The same holds for V, whose error the output
projection weighs with G = Wᵀ W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from carsam.transform.rotation import hadamard

# The eigenvalues of M Mᵀ stay within this factor of their geometric mean: as far as the balance moves a channel.
MOST_STRETCH = 25.0
# Of the mean of a moment's diagonal, added to it: what no token ever shows is not stretched without end.
LEAST_MOMENT = 1e-4


def powered(matrices: Tensor, exponent: float) -> Tensor:
    """Symmetric positive matrices (..., d, d) to a power."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=1e-30)[..., None, :] ** exponent) @ vectors.transpose(-2, -1)


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """A # B = A^½ (A^-½ B A^-½)^½ A^½, symmetric positive like A and B (..., d, d)."""
    root, inverse = powered(a, 0.5), powered(a, -0.5)
    return root @ powered(inverse @ b @ inverse, 0.5) @ root


def evening(first: Tensor, second: Tensor) -> Tensor:
    """M per head with Mᵀ A M = M⁻¹ B M⁻ᵀ as far as stretches allow, and its diagonal of one size.

    Args:
        first: A, second moments of what M multiplies, (heads, d, d).
        second: B, of what M⁻ᵀ multiplies.

    Returns:
        (heads, d, d) float64.
    """
    size = first.shape[-1]
    first, second = (_regular(each.double()) for each in (first, second))
    stretch = geometric_mean(powered(first, -1.0), second)
    values, vectors = torch.linalg.eigh(stretch)
    logs = values.clamp(min=1e-30).log()
    most = math.log(MOST_STRETCH)
    # One middle for all heads: what stands between them is kept.
    logs = logs - logs.mean()
    root = (vectors * (0.5 * logs.clamp(-most, most)).exp()[:, None, :]) @ vectors.transpose(-2, -1)
    axes = torch.linalg.eigh(root @ first @ root)[1]
    return root @ axes @ hadamard(size).to(root)


def _regular(moments: Tensor) -> Tensor:
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    return moments + LEAST_MOMENT * mean[:, None, None] * torch.eye(moments.shape[-1]).to(moments)


def per_head(moments: Tensor, heads: int) -> Tensor:
    """The blocks of each head, (heads, d, d), of moments over all channels."""
    size = len(moments) // heads
    blocks = moments.view(heads, size, heads, size)
    return torch.stack([blocks[head, :, head] for head in range(heads)])


def query_key_map(query: Tensor, key: Tensor, heads: int, *, shared: bool) -> Tensor:
    """M between Q and K.

    Args:
        query: Second moments of the queries, (channels, channels).
        key: Of the keys around their mean, which softmax ignores.
        heads: Number of heads.
        shared: One map for all heads (relative positions).

    Returns:
        (heads, d, d) float64.
    """
    first, second = per_head(query, heads), per_head(key, heads)
    if shared:
        found = evening(first.mean(0, keepdim=True), second.mean(0, keepdim=True))
        return found.expand(heads, -1, -1).contiguous()
    return evening(first, second)


def value_output_map(value: Tensor, weight: Tensor, heads: int) -> Tensor:
    """R between V and the output projection; all heads get one size, since one step serves them.

    Args:
        value: Second moments of the values, (channels, channels).
        weight: The output projection's, (out, channels).
        heads: Number of heads.

    Returns:
        (heads, d, d) float64.
    """
    moments, weight = per_head(value, heads).double(), weight.double()
    found = evening(moments, per_head(weight.T @ weight, heads))
    size = (found.transpose(-2, -1) @ moments @ found).diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30).log()
    most = 0.5 * math.log(MOST_STRETCH)
    return found * (0.5 * (size.mean() - size)).clamp(-most, most).exp()[:, None, None]
