"""The reconstruction loss."""

from __future__ import annotations

from torch import Tensor


def relative_loss(
    outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...], variances: list[float], channel_dim: int = -1
) -> Tensor:
    """Σ over outputs of the squared error, summed over channels and averaged over the rest, over the output's variance.

    The sum over channels is BRECQ's convention and what AdaRound's λ = 0.01 is balanced against; dividing by the
    variance puts the outputs of a JCAR pair on one scale (METHOD.md, 8) and makes λ independent of a unit's scale.

    Args:
        outputs, targets: Tensors of equal shapes.
        variances: Of each target over the calibration set.
        channel_dim: Where the channels are.

    Returns:
        Scalar.
    """
    total = 0
    for output, target, variance in zip(outputs, targets, variances):
        channels = output.shape[channel_dim]
        total = total + (output - target).square().mean() * (channels / variance)
    return total
