"""Changes of an attention's weights that leave its output as it is, so that Q, K and V quantize better (METHOD.md, 9).

softmax(Q Kᵀ) V Wₒ stays what it is when

- every key is moved by the same vector: a row of scores moves by a constant, which softmax ignores;
- every value is moved by μ, and the output's bias by −Wₒ μ: rows of P sum to one;
- Q is multiplied by M and K by M⁻ᵀ, for any invertible M of each head (relative positions, which meet the query as
  further keys, by M⁻ᵀ too);
- V is multiplied by R, and the output projection's columns by R⁻¹.

All of it is folded into the projections. What a family's table forbids is refused with the reason: keys that are
rotated after their projection (RoPE) cannot be moved, queries that are pooled cannot be mixed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carsam.models.sites import AttentionSite
from carsam.transform.operands import Refused, divide_columns, operand
from carsam.transform.statistics import ChannelStatistics

# The balance of Q against K moves no channel further than this.
LEAST_BALANCE, MOST_BALANCE = 0.2, 5.0


def check_mixing(site: AttentionSite, what: str) -> None:
    """Refuses what mixes the channels of Q and K where something stands between projection and MatMul.

    Raises:
        Refused: With the reason.
    """
    if site.rotary:
        raise Refused(f"{what} {site.name} is not exact: its queries and keys are rotated by their positions (RoPE).")
    if site.pooled:
        raise Refused(f"{what} {site.name} is not exact: its queries are pooled channel by channel.")


def centre_keys(model: nn.Module, site: AttentionSite, mean: Tensor) -> None:
    """k ← k − μ for every token.

    Args:
        model: Float model; changed in place.
        site: The attention.
        mean: μ, (channels,).

    Raises:
        Refused: The keys are rotated after their projection, or their projection has no bias.
    """
    if site.rotary:
        raise Refused(
            f"centring the keys of {site.name} is not exact: they are rotated by their positions (RoPE), which makes "
            "of one vector another one for each key."
        )
    operand(model, site, "key").shift(-mean)


@torch.no_grad()
def centre_values(model: nn.Module, site: AttentionSite, mean: Tensor) -> None:
    """v ← v − μ for every token, and b_o ← b_o + W_o μ.

    Args:
        model: Float model; changed in place.
        site: The attention.
        mean: μ, (channels,).

    Raises:
        Refused: The projection of the values, or the output's, has no bias.
    """
    output = model.get_submodule(site.output)
    if output.bias is None:
        raise Refused(f"centring the values of {site.name} needs a bias in {site.output}, which has none.")
    operand(model, site, "value").shift(-mean)
    output.bias += (output.weight.double() @ mean.double().to(output.weight.device)).to(output.bias.dtype)


@torch.no_grad()
def map_query_key(model: nn.Module, site: AttentionSite, matrices: Tensor) -> None:
    """Q ← Q M and K ← K M⁻ᵀ per head.

    Args:
        model: Float model; changed in place.
        site: The attention.
        matrices: M, (heads, head_dim, head_dim), invertible; all alike where the attention has relative positions,
            which its heads share.

    Raises:
        Refused: Queries or keys are rotated or pooled between projection and MatMul, or heads that share their
            relative positions were given different matrices.
    """
    check_mixing(site, "a map between the queries and keys of")
    matrices = matrices.double()
    inverse = torch.linalg.inv(matrices).transpose(-2, -1)
    if site.positions and not torch.equal(matrices, matrices[:1].expand_as(matrices)):
        raise Refused(
            f"the heads of {site.name} share their relative positions, so that one map must serve all of them."
        )
    operand(model, site, "query").map(matrices)
    operand(model, site, "key").map(inverse)
    for name in site.positions:
        positions = getattr(model.get_submodule(site.name), name)
        positions.copy_((positions.double() @ inverse[0].to(positions.device)).to(positions.dtype))


@torch.no_grad()
def scale_query_key(model: nn.Module, site: AttentionSite, factor: Tensor) -> None:
    """Q ← Q diag(t) and K ← K diag(t)⁻¹; a diagonal map, which pooled queries allow as well.

    Args:
        model: Float model; changed in place.
        site: The attention.
        factor: t > 0, (channels,); the same for every head where the attention has relative positions.

    Raises:
        Refused: The keys are rotated, or heads that share relative positions were given different factors.
    """
    if site.rotary:
        raise Refused(f"balancing the queries and keys of {site.name} is not exact: RoPE mixes their channels.")
    query, key = (operand(model, site, which) for which in ("query", "key"))
    per_head = factor.view(query.heads, query.head_dim)
    if site.positions and not torch.equal(per_head, per_head[:1].expand_as(per_head)):
        raise Refused(
            f"the heads of {site.name} share their relative positions, so that one balance must serve all of them."
        )
    query.scale(factor)
    key.scale(1 / factor)
    for name in site.positions:
        positions = getattr(model.get_submodule(site.name), name)
        positions.div_(per_head[0].to(positions))


def balance(query: ChannelStatistics, key: ChannelStatistics, heads: int, *, shared: bool) -> Tensor:
    """t = √(std K / rms Q) per channel, geometric mean 1, within [0.2, 5]: what makes both equally hard (METHOD.md, 9).

    Args:
        query, key: Statistics of both operands.
        heads: Number of heads.
        shared: One balance for all heads, from their mean squares (relative positions).

    Returns:
        (channels,) float64.
    """
    rms, std = query.rms.view(heads, -1), key.std.view(heads, -1)
    if shared:
        rms, std = (each.square().mean(0, keepdim=True).sqrt().expand(heads, -1) for each in (rms, std))
    logs = 0.5 * (std.clamp(min=1e-12).log() - rms.clamp(min=1e-12).log())
    logs = logs - logs.mean(1, keepdim=True)
    return logs.exp().clamp(LEAST_BALANCE, MOST_BALANCE).flatten()


@torch.no_grad()
def map_value_output(model: nn.Module, site: AttentionSite, matrices: Tensor) -> None:
    """V ← V R per head and R⁻¹ into the output projection's columns: PV Wₒ stays.

    Args:
        model: Float model; changed in place.
        site: The attention.
        matrices: R, (heads, head_dim, head_dim), invertible.
    """
    output = model.get_submodule(site.output)
    value = operand(model, site, "value")
    value.map(matrices)
    # y = Σ_h (P V_h R_h) R_h⁻¹ W_hᵀ, so the columns of head h become W_h R_h⁻ᵀ.
    columns = output.weight.double().view(output.out_features, value.heads, value.head_dim).transpose(0, 1)
    inverse = torch.linalg.inv(matrices.double()).transpose(-2, -1).to(columns.device)
    output.weight.copy_((columns @ inverse).transpose(0, 1).flatten(1).to(output.weight.dtype))


@torch.no_grad()
def scale_value_output(model: nn.Module, site: AttentionSite, factor: Tensor) -> None:
    """V ← V diag(t), and the output projection's columns divided by t, (channels,)."""
    operand(model, site, "value").scale(factor)
    divide_columns(model.get_submodule(site.output), factor)


def even_values(value: ChannelStatistics, centred: bool, heads: int) -> Tensor:
    """Factors that give all channels of V the same spread, geometric mean 1, within [0.2, 5].

    One grid serves all channels of V, while the output projection has one for each *output* channel: what is divided
    out of V widens single columns there.

    Args:
        value: Statistics of the values.
        centred: They will be centred, so their standard deviation counts and not their size.
        heads: Number of heads.
    """
    size = (value.std if centred else value.rms).view(heads, -1).clamp(min=1e-12).log()
    # Half of the way, as between Q and K: the other half would only move the spread into the columns.
    return (0.5 * (size.mean() - size)).exp().clamp(LEAST_BALANCE, MOST_BALANCE).flatten()
