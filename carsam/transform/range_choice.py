"""Which grid serves a layer's input, by the error of the layer's output on held-out images.

The usual range search weighs all values alike. A layer does not: values far out may be the ones that decide its output.
And one range for all channels is wide where they lie apart: a shift for each brings them together.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from carsam.bits.plan import BitPlan
from carsam.calibrate.counted import Counted, uncounted
from carsam.calibrate.sensitivity import RowWeights, sampled_rows, unweighed
from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers.affine import decode, encode
from carsam.quantizers.ranges import Range
from carsam.quantizers.sampling import odd_step_within, sampled_patches
from carsam.quantizers.shifted import Shift, ShiftedQuantizer, ShiftedRecord
from carsam.quantizers.uniform import UniformRecord
from carsam.transform.calls import JUDGES
from carsam.transform.choice import LEAST_GAIN
from carsam.transform.statistics import hooked, pass_over, spared_embedding

# Rows of an image that judge.
ROWS = 192
# What reports call a grid that is shifted per channel, and from how many bits on none is: there is nothing to win.
SHIFTED, ENOUGH_BITS = ShiftedQuantizer.grid, 8


@dataclass
class _Seen:
    """What was seen of a layer's input: records of the images that set ranges, and rows of the others."""

    record: UniformRecord = field(default_factory=UniformRecord)
    channels: ShiftedRecord | None = None
    rows: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Some of the rows that a layer's outputs are computed from, (groups, rows, d): tokens, or patches of a map."""
    if isinstance(layer, nn.Conv2d):
        settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return sampled_patches(x.detach(), layer.kernel_size, **settings, most=ROWS)
    flat = x.detach().flatten(0, -2)[None]
    return flat[:, :: odd_step_within(flat.shape[1], ROWS)].clone()


def shift_of(layer: nn.Module) -> Shift | None:
    """How the input of a layer may be shifted; None where padding or a field of several points stands against it.

    A padded zero would have to be a value of every channel's grid.
    """
    if isinstance(layer, nn.Linear):
        return Shift(maps=0)
    single = all(size == 1 for size in layer.kernel_size) and not any(layer.padding) and layer.groups == 1
    return Shift(maps=1) if single else None


@torch.no_grad()
def choose_ranges(
    model: nn.Module,
    sites: Sites,
    data: CalibrationSet,
    plan: BitPlan,
    *,
    observers: Sequence[str],
    shifts: bool = False,
    known: Mapping[str, str | Range] | None = None,
    leave: Container[str] = (),
    images: int = 9,
    weights: RowWeights = unweighed,
    counted: Counted = uncounted,
) -> tuple[dict[str, str | Shift], list[dict[str, Any]]]:
    """Observers of layers' inputs where another one than the first serves better, and shifts where these do.

    Args:
        model: Float model.
        sites: The sites to treat.
        data: Calibration images; the first of them are used, every third judges. Large ones with a known embedding
            show the decoder alone, beyond the first few.
        plan: Bits of the layers' inputs.
        observers: To choose from; the first is the usual one.
        shifts: Try a shift for every channel as well, at layers of single points with fewer than 8 bits.
        known: Ranges by activation site that were chosen already, with what they feed: only a shift may replace them.
        leave: Layers to leave alone: their inputs have no single range.
        images: Calibration images to use.
        weights: Of the squared errors of a layer's rows on an image.
        counted: Given the images.

    Returns:
        Observers or shifts by activation site, and one report a layer that got another one.
    """
    layers = {
        site.name: site.input
        for site in sites.layers
        if site.name not in leave and plan.activation_bits(site.input) < 16
    }
    possible = {
        name: shift_of(model.get_submodule(name)) if shifts and plan.activation_bits(site) < ENOUGH_BITS else None
        for name, site in layers.items()
    }
    seen = {
        name: _Seen(channels=None if shift is None else ShiftedRecord(shift.maps)) for name, shift in possible.items()
    }
    judged = min(images, len(data.images)) >= JUDGES
    for index, image in enumerate(counted(data.images[:images])):
        judging = judged and index % JUDGES == JUDGES - 1

        def see(name: str, x: Tensor, judging: bool = judging, index: int = index) -> None:
            if not judging:
                seen[name].record.update(x)
                if seen[name].channels is not None:
                    seen[name].channels.update(x, weight=model.get_submodule(name).weight)
            if judging or not judged:
                rows = rows_of(model.get_submodule(name), x)
                seen[name].rows.append(rows)
                own = weights(name, index)
                seen[name].weights.append(rows.new_ones(rows.shape[1]) if own is None else sampled_rows(own, ROWS))

        hooks = [(name, lambda x, _out, name=name, see=see: see(name, x)) for name in layers]
        with hooked(model, hooks):
            pass_over(model, sites, image, spared_embedding(data, index))

    chosen: dict[str, str | Shift] = {}
    reports = []
    for name, site in layers.items():
        if not seen[name].record.seen:  # the memory of a video: a pass over an image does not reach it
            continue
        layer, rows = model.get_submodule(name), torch.cat(seen[name].rows, dim=1)
        weight = layer.weight.detach().flatten(1).unflatten(0, (len(rows), -1)).transpose(1, 2)
        own = torch.cat([each.to(rows) for each in seen[name].weights]).sqrt()[None, :, None]
        bits, errors = plan.activation_bits(site), {}
        usual = observers if known is None or site not in known else (known[site],)
        for observer in usual:
            scale, zero = seen[name].record.uniform_grid(bits, observer)
            missing = decode(encode(rows, scale, zero, bits), scale, zero).sub_(rows)
            errors[observer] = (missing * own @ weight).square().sum().item()
        if seen[name].channels is not None:
            missing = seen[name].channels.rounded(rows, bits).sub_(rows)
            errors[SHIFTED] = (missing * own @ weight).square().sum().item()
        first, best = errors[usual[0]], min(errors, key=errors.get)
        if errors[best] < (1 - LEAST_GAIN) * first:
            chosen[site] = possible[name] if best == SHIFTED else best
            reports.append({"transform": "range", "site": site, "observer": best, "error": errors[best] / first})
    return chosen, reports
