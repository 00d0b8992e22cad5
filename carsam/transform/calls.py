"""What the float model's attentions are called with on calibration images, cut to what a trial needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from carsam.calibrate.counted import Counted, uncounted
from carsam.calibrate.sensitivity import RowWeights
from carsam.models.family import Tensors
from carsam.models.sites import AttentionSite, Sites
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers.sampling import step_for
from carsam.transform.statistics import hooked, pass_over, spared_embedding

# Every third image judges what the others set ranges on.
JUDGES = 3
# Prompts and windows of an image that a trial is made with: they differ less than images do.
PROMPTS, WINDOWS = 2, 4
# Side of what is cut from a map of tokens (batch, height, width, channels): a global attention of ViT-B over all of its
# 4,096 tokens takes seconds a trial. The float output that a trial is compared with is of the same piece.
LARGEST_SIDE = 32
# Attentions are learned on calls of no more scores than this, cut to tiles of this side where one window has more: a
# step costs what the call does. Four windows of 14 × 14 tokens by 12 heads have 1.8 million.
LEARNED_SCORES, TILE = 2**20, 16
# Tensors with more values than this are kept in half precision, as the activation cache keeps all of its.
LARGE = 2**18

Call = tuple[tuple, dict[str, Any]]


@dataclass
class Calls:
    """Arguments of an attention, one call an image: of images that teach, and of those that judge.

    Attributes:
        fit, judge: The calls.
        fit_images, judge_images: Numbers of their images.
        rows: Weights of the squared errors of the rows that the call on an image gives; None where all count alike.
    """

    fit: list[Call] = field(default_factory=list)
    judge: list[Call] = field(default_factory=list)
    fit_images: list[int] = field(default_factory=list)
    judge_images: list[int] = field(default_factory=list)
    rows: Callable[[int], Tensor | None] = lambda _image: None

    @property
    def fit_weights(self) -> list[Tensor | None]:
        """Weights of the calls that teach."""
        return [self.rows(image) for image in self.fit_images]

    @property
    def judge_weights(self) -> list[Tensor | None]:
        """Weights of the calls that judge."""
        return [self.rows(image) for image in self.judge_images]

    def first(self, images: int) -> Calls:
        """Those of the first images alone."""
        judge = images // JUDGES
        fit = slice(images - judge)
        teaching = self.fit[fit], self.fit_images[fit]
        judging = (self.judge[:judge], self.judge_images[:judge]) if self.judge[:judge] else teaching
        return Calls(teaching[0], judging[0], teaching[1], judging[1], self.rows)


def island(path: str, module: nn.Module) -> nn.Module:
    """A model that holds one module at its path and nothing else."""
    root = node = nn.Module()
    *parents, name = path.split(".")
    for parent in parents:
        child = nn.Module()
        node.add_module(parent, child)
        node = child
    node.add_module(name, module)
    return root


def call(module: nn.Module, arguments: Call) -> Tensor:
    """The attention's output, in single precision."""

    def full(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    result = module(*map(full, arguments[0]), **{name: full(value) for name, value in arguments[1].items()})
    return result if isinstance(result, Tensor) else result[0]


def weighed(errors: Tensor, weights: Tensor | None) -> Tensor:
    """Σ of squared errors (..., channels), each row times its weight."""
    squares = errors.square()
    if weights is None:
        return squares.sum()
    # Prompts may lie in the first dimension or in the second.
    return (squares.sum(-1) * weights.to(squares).view(squares.shape[:-1])).sum()


def _cut(value: Any, *, windows: int, maps: bool) -> Any:
    """Some windows or prompts of a tensor, evenly spaced, and the middle of large maps; anything else as it is."""
    if not isinstance(value, Tensor) or value.dim() <= 2:
        return value
    value = value[:: step_for(len(value), windows)][:windows]
    if maps and value.dim() == 4:
        for dimension in (1, 2):
            side = min(value.shape[dimension], LARGEST_SIDE)
            value = value.narrow(dimension, (value.shape[dimension] - side) // 2, side)
    return value.half() if value.numel() > LARGE and value.is_floating_point() else value.clone()


def small_calls(arguments: Call, heads: int) -> list[Call]:
    """A call over windows, or over a map of tokens, as several of few scores; as it is where it is none or has few.

    Args:
        arguments: What the attention is called with, one tensor: (windows, height, width, channels).
        heads: Heads of the attention.
    """
    args, kwargs = arguments
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    if len(tensors) != 1 or tensors[0].dim() != 4:
        return [arguments]
    windows, height, width, _ = tensors[0].shape
    if windows * heads * (height * width) ** 2 <= LEARNED_SCORES:
        return [arguments]
    pieces = tensors[0].split(1)
    if heads * (height * width) ** 2 > LEARNED_SCORES:
        pieces = [tile for each in pieces for band in each.split(TILE, dim=1) for tile in band.split(TILE, dim=2)]

    def of(piece: Tensor) -> Call:
        replaced = [piece if each is tensors[0] else each for each in args]
        return tuple(replaced), {name: piece if each is tensors[0] else each for name, each in kwargs.items()}

    return [of(piece) for piece in pieces]


def captured_calls(
    model: nn.Module,
    sites: Sites,
    data: CalibrationSet,
    images: int,
    hooks: Iterable[tuple[str, Callable[[Tensor, Tensor], None]]] = (),
    counted: Counted = uncounted,
) -> tuple[dict[str, Calls], list[Tensors]]:
    """Calls of every attention, from one pass of the float model over each image; and what its encoder gave.

    Large images with a known embedding show the decoder alone, beyond the first few.

    Args:
        model: Float model.
        sites: The sites to treat.
        data: Calibration images; the first of them are used, every third judges.
        images: How many.
        hooks: What else looks on, as in :func:`carsam.transform.statistics.hooked`.
        counted: Given the images.

    Returns:
        Calls by attention; what the encoder gave on the images, where the family's passes go through that.
    """
    calls = {site.name: Calls() for site in sites.attentions}
    encoded: list[Tensors] = []
    judging, at = False, 0

    def see(site: AttentionSite, args: tuple, kwargs: dict) -> None:
        windows = PROMPTS if site.coupled else WINDOWS
        cut = partial(_cut, windows=windows, maps=not site.coupled)
        kept = tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
        own = calls[site.name]
        (own.judge if judging else own.fit).append(kept)
        (own.judge_images if judging else own.fit_images).append(at)

    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda _module, args, kwargs, site=site: see(site, args, kwargs), with_kwargs=True
        )
        for site in sites.attentions
    ]
    try:
        with hooked(model, hooks):
            for index, image in enumerate(counted(data.images[:images])):
                at = index
                judging = index % JUDGES == JUDGES - 1
                some = replace(image, boxes=image.boxes[:PROMPTS])
                given = pass_over(model, sites, some, spared_embedding(data, index))
                if given is not None:
                    encoded.append(given)
    finally:
        for handle in handles:
            handle.remove()
    for each in calls.values():
        if not each.judge:  # too few images to hold any out
            each.judge, each.judge_images = each.fit, each.fit_images
    return calls, encoded


def weigh_calls(calls: dict[str, Calls], sites: Sites, weights: RowWeights) -> None:
    """Gives the calls of the decoder's attentions their weights.

    Args:
        calls: By attention.
        sites: The sites.
        weights: Of the squared errors of an output projection's rows on an image.
    """

    def rows(layer: str, image: int) -> Tensor | None:
        found = weights(layer, image)
        return None if found is None else found[:PROMPTS]

    for site in sites.attentions:
        if site.coupled:
            calls[site.name].rows = partial(rows, site.output)
