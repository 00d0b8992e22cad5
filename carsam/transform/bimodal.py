"""BIG, Bimodal Integration (PTQ4SAM, CVPR 2024, arXiv 2405.03144): keys with two modes are folded into one.

Where the keys of an attention have two peaks, channels centre around +m or −m. Multiplying channel c of both the query
and the key projection by sign(mean_c K) leaves QKᵀ what it was and puts all channels on one side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers.sampling import strided

# PTQ4SAM's rule: density at 128 points, a peak is at least 0.01 of their sum high and 32 points away from the next.
POINTS, PEAK_HEIGHT, PEAK_DISTANCE = 128, 0.01, 32
# How :func:`integrate_bimodal_keys` judges.
BIMODAL_RULES = ("calibration", "published")
# Values that a density is estimated from: enough for two peaks, few enough for 128 exponentials each.
SAMPLE_SIZE = 2**13


def density(values: Tensor, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian kernel density with Scott's bandwidth, n^(−1/5) standard deviations.

    Args:
        values: (n,) values, not all alike.
        points: Points from the least to the largest value.

    Returns:
        ``(grid, density)``, each (points,) float64.
    """
    from scipy.stats import gaussian_kde  # takes most of a second to import

    sample = values.double().cpu().numpy()
    grid = np.linspace(sample.min(), sample.max(), points)
    return grid, gaussian_kde(sample)(grid)


def count_modes(values: Tensor) -> int:
    """Number of modes of some values (any shape) by PTQ4SAM's rule; at least 1."""
    from scipy.signal import find_peaks

    sample = strided(values.detach(), SAMPLE_SIZE).double()
    spread = (sample.max() - sample.min()).item() if sample.numel() else 0.0
    if not 0 < spread < math.inf:
        return 1
    _, heights = density(sample)
    peaks, _ = find_peaks(heights, height=PEAK_HEIGHT * heights.sum(), distance=PEAK_DISTANCE)
    return max(1, len(peaks))


def channel_signs(means: Tensor) -> Tensor:
    """sign(mean_c K) per channel, (channels,) → (channels,) of ±1; a mean of zero keeps its sign."""
    return torch.where(means < 0, -1.0, 1.0)


@torch.no_grad()
def flip_channels(query: nn.Linear, key: nn.Linear, signs: Tensor) -> None:
    """Multiplies the output channels of both projections, weights and biases, by ``signs`` (channels,)."""
    for layer in (query, key):
        layer.weight.mul_(signs[:, None])
        if layer.bias is not None:
            layer.bias.mul_(signs)


@torch.no_grad()
def integrate_bimodal_keys(
    model: nn.Module, sites: Sites, data: CalibrationSet, *, rule: str = "calibration"
) -> list[dict]:
    """BIG at decoder attentions.

    Attentions whose keys are rotated by position (RoPE, in a video's memory) are left out: the rotation mixes pairs of
    channels, so one sign for a channel of Q and K would change their product.

    Args:
        model: Float model; changed in place.
        sites: Its sites.
        data: Calibration images with boxes.
        rule: ``calibration`` judges the keys of every decoder attention over the whole calibration set;
            ``published``, as public code, those of the token→image attentions alone, their modes by the first prompt
            of the first image, their signs by all prompts of it.

    Returns:
        Per attention that was judged: its name, the modes of its keys, and the number of flipped channels.
    """
    assert rule in BIMODAL_RULES, rule
    published = rule == "published"
    coupled = {site.name: site for site in sites.attentions if site.coupled and not site.rotary}
    names = [name for name in coupled if not published or name in sites.focus]
    images = data.images[:1] if published else data.images
    samples: dict[str, list[Tensor]] = {name: [] for name in names}
    sums = dict.fromkeys(names, 0)
    counts = dict.fromkeys(names, 0)

    def see(name: str, keys: Tensor) -> None:
        """Takes keys (..., prompts, tokens, channels)."""
        rows = keys.flatten(0, -2).float()
        sums[name] = sums[name] + rows.sum(0, dtype=torch.float64)
        counts[name] += len(rows)
        judged = keys.flatten(0, -3)[0].float() if published else rows
        samples[name].append(strided(judged, SAMPLE_SIZE // max(1, len(images)) + 1).cpu())

    handles = [
        model.get_submodule(coupled[name].key.layer).register_forward_hook(
            lambda _m, _a, out, name=name: see(name, out)
        )
        for name in names
    ]
    try:
        for image in images:
            sites.family.forward(model, image)
    finally:
        for handle in handles:
            handle.remove()

    reports = []
    for name in names:
        query, key = (model.get_submodule(part.layer) for part in (coupled[name].query, coupled[name].key))
        keys = torch.cat(samples[name])
        report = {"transform": "BIG", "attention": name, "modes": count_modes(keys), "flipped_channels": 0}
        if report["modes"] == 2:
            signs = channel_signs(sums[name] / counts[name]).to(key.weight)
            flip_channels(query, key, signs)
            report["flipped_channels"] = int((signs < 0).sum())
        reports.append(report)
    return reports
