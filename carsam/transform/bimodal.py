"""BIG, Bimodal Integration (PTQ4SAM, CVPR 2024, arXiv 2405.03144): keys with two modes are folded into one.

Where the keys of an attention have two peaks, channels centre around +m or −m. Multiplying channel c of both the query
and the key projection by sign(mean_c K) leaves QKᵀ what it was and puts all channels on one side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers.sampling import strided

# PTQ4SAM's rule: density at 128 points, a peak is at least 0.01 of their sum high and 32 points away from the next.
POINTS, PEAK_HEIGHT, PEAK_DISTANCE = 128, 0.01, 32
# Values that a density is estimated from: enough for two peaks, few enough for 128 exponentials each.
SAMPLE_SIZE = 2**13


def density(values: Tensor, points: int = POINTS) -> tuple[Tensor, Tensor]:
    """Gaussian kernel density with Scott's bandwidth, n^(−1/5) standard deviations.

    Args:
        values: Any shape; evenly strided to at most ``SAMPLE_SIZE`` values.
        points: Points from the least to the largest value.

    Returns:
        ``(grid, density)``, each (points,) float64.
    """
    sample = strided(values.detach(), SAMPLE_SIZE).double().cpu()
    grid = torch.linspace(sample.min().item(), sample.max().item(), points, dtype=torch.float64)
    width = max(sample.std().item(), 1e-12) * sample.numel() ** -0.2
    kernels = torch.exp(-0.5 * ((grid[:, None] - sample) / width).square_())
    return grid, kernels.mean(1) / (width * (2 * torch.pi) ** 0.5)


def find_peaks(heights: Tensor, *, least: float, distance: int) -> list[int]:
    """Local maxima at least ``least`` high, of which a higher one removes those closer than ``distance``.

    The rule of ``scipy.signal.find_peaks``: ends do not count, of a plateau its middle does.

    Args:
        heights: (n,) values.
        least: Least height of a peak.
        distance: Least distance between peaks, in points.

    Returns:
        Positions, ascending.
    """
    values = heights.tolist()
    peaks, start = [], 1
    while start < len(values) - 1:
        end = start
        while end + 1 < len(values) and values[end + 1] == values[start]:
            end += 1
        if end < len(values) - 1 and values[start - 1] < values[start] > values[end + 1] and values[start] >= least:
            peaks.append((start + end) // 2)
        start = end + 1
    kept: list[int] = []
    for peak in sorted(peaks, key=lambda position: values[position], reverse=True):
        if all(abs(peak - other) >= distance for other in kept):
            kept.append(peak)
    return sorted(kept)


def count_modes(values: Tensor) -> int:
    """Number of modes of some values by PTQ4SAM's rule; at least 1."""
    flat = values.detach().flatten()
    if flat.numel() < 2 or bool(flat.max() == flat.min()):
        return 1
    _, heights = density(flat)
    return max(1, len(find_peaks(heights, least=PEAK_HEIGHT * heights.sum().item(), distance=PEAK_DISTANCE)))


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
def integrate_bimodal_keys(model: nn.Module, sites: Sites, data: CalibrationSet) -> list[dict]:
    """BIG at every decoder attention, judged over the whole calibration set and not over one sample.

    Args:
        model: Float SAM; changed in place.
        sites: Its sites.
        data: Calibration images with boxes.

    Returns:
        Per decoder attention: its name, the modes of its keys before and after, and the number of flipped channels.
    """
    names = [site.name for site in sites.attentions if not site.fused]
    samples: dict[str, list[Tensor]] = {name: [] for name in names}
    sums = dict.fromkeys(names, 0)
    counts = dict.fromkeys(names, 0)

    def see(name: str, keys: Tensor) -> None:
        rows = keys.flatten(0, -2).float()
        sums[name] = sums[name] + rows.sum(0, dtype=torch.float64)
        counts[name] += len(rows)
        samples[name].append(strided(rows, SAMPLE_SIZE // max(1, len(data.images)) + 1).cpu())

    handles = [
        model.get_submodule(name).k_proj.register_forward_hook(lambda _m, _a, out, name=name: see(name, out))
        for name in names
    ]
    device = next(model.parameters()).device
    try:
        for image in data.images:
            model(**image.inputs(device))
    finally:
        for handle in handles:
            handle.remove()

    reports = []
    for name in names:
        attention = model.get_submodule(name)
        keys = torch.cat(samples[name])
        report = {"transform": "BIG", "attention": name, "modes": count_modes(keys), "flipped_channels": 0}
        if report["modes"] == 2:
            signs = channel_signs(sums[name] / counts[name]).to(attention.k_proj.weight)
            flip_channels(attention.q_proj, attention.k_proj, signs)
            report["flipped_channels"] = int((signs < 0).sum())
        reports.append(report)
    return reports
