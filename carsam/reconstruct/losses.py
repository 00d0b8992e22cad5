"""The reconstruction loss."""

from __future__ import annotations

from torch import Tensor


def relative_loss(
    outputs: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    variances: list[float],
    channel_dim: int = -1,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Σ over outputs of the squared error, summed over channels and averaged over the rest, over the output's variance.

    The sum over channels is BRECQ's convention and what AdaRound's λ = 0.01 is balanced against; dividing by the
    variance puts the outputs of a JCAR pair on one scale (METHOD.md, 8) and makes λ independent of a unit's scale.

    Args:
        outputs, targets: Tensors of equal shapes.
        variances: Of each target over the calibration set.
        channel_dim: Where the channels are.
        weights: Of each output's squared errors, broadcasting against it, mean about 1; None counts all alike.

    Returns:
        Scalar.
    """
    total = 0
    for i, (output, target, variance) in enumerate(zip(outputs, targets, variances)):
        channels = output.shape[channel_dim]
        error = (output - target).square()
        if weights is not None:
            error = error * weights[i]
        total = total + error.mean() * (channels / variance)
    return total
