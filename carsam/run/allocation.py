"""From a budget to the bits of every site: errors of sites alone on held-out calibration images, then the search."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from carsam.bits.allocation import (
    MIXED_BITS,
    Allocation,
    Budget,
    BudgetError,
    Candidate,
    allocate,
    check_budget,
    interpolated,
)
from carsam.bits.plan import BitPlan, Bits
from carsam.calibrate.counted import Count
from carsam.calibrate.ranges import calibrate
from carsam.calibrate.site_errors import SiteErrors, numbered_parts, relative_error
from carsam.methods.base import Method
from carsam.models.forward import encode_image
from carsam.models.prepare import MakeSoftmax, prepare_model
from carsam.models.sites import OPERANDS, Sites
from carsam.pack.bits import packed_size
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage
from carsam.quantizers import ActivationQuantizer, UniformSoftmax, simulate
from carsam.run.walk import fit_weights

# Bits at which sites of the decoder are tried, and those of the encoder, where a try takes most of a pass over an
# image: what lies between and beyond follows. Encoders tried at all three gave no better plans (docs/BEYOND.md).
MEASURED, IN_ENCODER = (3, 4, 6), (4,)
# Images that judge, and that set ranges; of large ones fewer, which have as many values.
JUDGES, RANGES = 2, 8
LARGE_JUDGES, LARGE_RANGES = 1, 2
# What the header of a safetensors file says of a tensor, and the scale and zero point of an output channel, in bytes.
HEADER, PER_CHANNEL = 150, 5


@dataclass(frozen=True)
class Measured:
    """Sites with their errors by bits."""

    weights: list[Candidate]
    activations: list[Candidate]


def plan_for_budget(
    budget: Budget,
    reference: nn.Module,
    sites: Sites,
    plan: BitPlan,
    method: Method,
    data: CalibrationSet,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[BitPlan, dict[str, Any]]:
    """The plan with the least summed error that a budget allows.

    Args:
        budget: Mean bits: of weights, and of activations weighed by their number of elements over the calibration image
            with the most prompts. Or the size of the weights' file: then activations keep the mean of the given plan's
            default. A video's memory, which no image reaches, has whole bits: those of the mean, or of the plan.
        reference: Float model, after the method's :meth:`~carsam.methods.base.Method.transform`; what the method
            chooses by measuring it chooses for these bits, afterwards.
        sites: All of its sites.
        plan: What the bits would be without a budget; what it leaves in floating point stays there.
        method: Gives grids and observers.
        data: Calibration images: the last few judge, others set ranges.
        progress: Called as ``progress(done, total)``.

    Returns:
        The plan, and a report of it.

    Raises:
        BudgetError: No plan meets the budget; the message names the nearest that one does.
    """
    check_affordable(budget, reference, sites, plan)
    seen = sites.on_images()
    if budget.bits is not None:  # of what no image reaches
        plan = replace(plan, default=plan.with_bits(min(int(budget.bits), MIXED_BITS[-1])).default)
    measured = measure(reference, seen, plan, method, data, progress)
    overhead = _overhead(reference, sites, plan)
    weights, activations = _search(budget, measured, plan, overhead)
    found: dict[str, Bits] = {}
    for site in seen.layers:  # a layer's path names its weights and its input
        if site.name in weights.bits or site.input in activations.bits:
            of_weights = weights.bits.get(site.name, plan.weight_bits(site.name))
            found[site.name] = Bits(of_weights, activations.bits.get(site.input, plan.activation_bits(site.input)))
    inputs = {site.input for site in seen.layers}
    found |= {name: Bits(16, bits) for name, bits in activations.bits.items() if name not in inputs}
    report = {
        "transform": "allocation",
        "budget": str(budget),
        "weights": _shown(weights),
        "activations": _shown(activations),
        "bytes": overhead + sum(packed_size(c.size, weights.bits[c.name]) for c in measured.weights),
    }
    return replace(plan, overrides=(*plan.overrides, *found.items())), report


def check_affordable(budget: Budget, model: nn.Module, sites: Sites, plan: BitPlan) -> None:
    """Refuses a budget that the least bits exceed; nothing is measured for it.

    Args:
        budget: The budget.
        model: The float model.
        sites: Its sites.
        plan: Says what stays in floating point.

    Raises:
        BudgetError: With the nearest budget that can be met.
    """
    check_budget(budget)
    if budget.size is None:
        return
    overhead = _overhead(model, sites, plan)
    mixed = [site.name for site in sites.on_images().layers if plan.weight_bits(site.name) < 16]
    least = overhead + sum(packed_size(model.get_submodule(name).weight.numel(), MIXED_BITS[0]) for name in mixed)
    if budget.size < least:
        raise BudgetError(
            f"{budget} cannot be met: with {MIXED_BITS[0]} bits for every weight the file has {least / 1e6:.2f} MB, of "
            f"which {overhead / 1e6:.2f} MB are not weights whose bits are mixed. The nearest budget that can "
            f"be met is {_up(least)}MB."
        )


def _search(budget: Budget, measured: Measured, plan: BitPlan, overhead: int) -> tuple[Allocation, Allocation]:
    """Bits of weights and of activations; ``overhead``: bytes of the weights' file beside the codes."""
    totals = [sum(each.size for each in kind) for kind in (measured.weights, measured.activations)]
    mean = budget.bits if budget.bits is not None else float(min(plan.default.activations, MIXED_BITS[-1]))
    activations = allocate(measured.activations, int(mean * totals[1] + 1e-6))
    if budget.size is None:
        return allocate(measured.weights, int(budget.bits * totals[0] + 1e-6)), activations
    # Every layer's codes end in a whole byte.
    spare = 8 * (budget.size - overhead - len(measured.weights))
    return allocate(measured.weights, max(spare, MIXED_BITS[0] * totals[0])), activations


def _up(size: int) -> str:
    """Megabytes, rounded up to hundredths."""
    return f"{-(-size // 10_000) / 100:g}"


def _shown(allocation: Allocation) -> str:
    counts = Counter(allocation.bits.values())
    return f"mean {allocation.mean_bits:.3f}: " + ", ".join(f"{counts[b]} with {b}" for b in sorted(counts))


@torch.no_grad()
def measure(
    reference: nn.Module,
    sites: Sites,
    plan: BitPlan,
    method: Method,
    data: CalibrationSet,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Measured:
    """Error of the mask logits with each site alone rounded to nearest, at the bits that :data:`MEASURED` names.

    Of a softmax output it is the least among the grids that the method may give it
    (:meth:`~carsam.methods.base.Method.softmax_choices`): which one that is depends on the bits.

    Args as for :func:`plan_for_budget`.
    """
    count, ranges = (LARGE_JUDGES, LARGE_RANGES) if data.images[0].large else (JUDGES, RANGES)
    judges = data.images[-count:] if len(data.images) > count else data.images
    others = CalibrationSet(tuple(data.images[: max(1, len(data.images) - count)][:ranges]), 0, "")
    base = _prepared(reference, sites, BitPlan(Bits(16, 16)), lambda _s, bits, _r: ActivationQuantizer(bits), _float)
    # The decoder runs for every prompt: counted over an image with few, its activations would be cheaper than they are.
    sizes = _sizes(base, sites, max(data.images, key=lambda image: len(image.boxes)))
    errors = SiteErrors(base, sites, judges)
    first, *further = method.softmax_choices()
    plans = [
        replace(plan.with_bits(bits), within=plan.within if bits in IN_ENCODER else sites.decoder).among(sites)
        for bits in MEASURED
    ]
    counted = Count(sum(_tries(sites, tried, 1 + len(further)) for tried in plans), progress)
    encode = functools.cache(functools.partial(encode_image, reference))
    found: dict[tuple[str, str], dict[int, float]] = {}
    for tried in plans:
        for softmax in (first, *further):
            rounded = _prepared(reference, sites, tried, method.quantizer_for, softmax)
            fit_weights(rounded, method.weight_observer)
            calibrate(rounded, others, method.activation_observer, encode=encode if tried.within else None)
            # A layer's attribute is its rounded weight.
            for layer in (rounded.get_submodule(site.name) for site in sites.layers):
                layer.freeze()
            parts = list(numbered_parts(rounded, sites))
            if softmax is not first:
                parts = [(part, stage) for part, stage in parts if part.attribute == OPERANDS[-1]]
            for part, stage in counted(parts):
                error = relative_error(errors.logits_with(rounded, part, stage), errors.targets)
                known = found.setdefault((part.kind, part.site), {})
                known[part.bits] = min(error, known.get(part.bits, error))

    def candidates(kind: str) -> list[Candidate]:
        return [Candidate(name, sizes[name], interpolated(e)) for (k, name), e in found.items() if k == kind]

    return Measured(candidates("weight"), candidates("activation"))


def _tries(sites: Sites, plan: BitPlan, grids: int) -> int:
    """How many tries a plan has: weights, activations, and every grid of P."""
    probs = [site.operand(OPERANDS[-1]) for site in sites.attentions]
    bits = [plan.weight_bits(site.name) for site in sites.layers]
    bits += [plan.activation_bits(name) for name in (*sites.activation_names, *probs * (grids - 1))]
    return sum(each < 16 for each in bits)


def _float(_site: str, _bits: int) -> UniformSoftmax:
    return UniformSoftmax(16)


def _prepared(
    reference: nn.Module, sites: Sites, plan: BitPlan, quantizer: Callable[..., nn.Module], softmax: MakeSoftmax
) -> nn.Module:
    model = copy.deepcopy(reference)
    prepare_model(model, sites, plan, quantizer, softmax)
    return model.to(next(reference.parameters()).device).eval().requires_grad_(False)


def _sizes(base: nn.Module, sites: Sites, image: PromptedImage) -> dict[str, int]:
    """Weights of every layer, and elements of every activation site in a pass over an image with its prompts."""
    sizes = {site.name: base.get_submodule(site.name).weight.numel() for site in sites.layers}
    handles = []

    def count(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            sizes[name] = sizes.get(name, 0) + out.numel()

        return hook

    quantizers: Mapping[str, nn.Module] = {
        **{site.input: base.get_submodule(site.name).input_quantizer for site in sites.layers},
        **{
            site.operand(which): getattr(base.get_submodule(site.name).matmul, which)
            for site in sites.attentions
            for which in OPERANDS
        },
    }
    for name, module in quantizers.items():
        handles.append(module.register_forward_hook(count(name)))
    try:
        with simulate(activations=False):
            sites.family.forward(base, image)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _overhead(reference: nn.Module, sites: Sites, plan: BitPlan) -> int:
    """Bytes of the file beside codes whose bits are mixed: half precision, scales, the header, a memory's weights."""
    state = reference.state_dict()
    quantized = {site.name: state[f"{site.name}.weight"] for site in sites.layers if plan.weight_bits(site.name) < 16}
    mixed = {site.name for site in sites.on_images().layers}
    fixed = sum(packed_size(w.numel(), plan.weight_bits(name)) for name, w in quantized.items() if name not in mixed)
    channels = sum(len(weight) for weight in quantized.values())
    halves = sum(value.numel() for value in state.values()) - sum(weight.numel() for weight in quantized.values())
    tensors = len(state) + 2 * len(quantized) + 2 * len(sites.activation_names)
    return fixed + 2 * halves + PER_CHANNEL * channels + HEADER * tensors
