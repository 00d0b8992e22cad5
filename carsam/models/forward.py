"""A model in two halves: an image becomes embeddings, and prompts with embeddings become masks.

Prediction, calibration and evaluation all run models through these functions, so that the same prompt gives the same
numbers everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from carsam.models.family import family_of
from carsam.models.prompts import check_prompts

if TYPE_CHECKING:
    from carsam.runtime.halves import Halves

Source = Callable[[Tensor, Callable[[], Tensor]], Tensor]
_sources: dict[int, Source] = {}
Around = Callable[[str, Callable[[], Any]], Any]
_around: Around = lambda _name, run: run()  # noqa: E731 - replaced below, and back


@contextmanager
def watched(around: Around) -> Iterator[None]:
    """Calls ``around(name, run)`` in the place of every half inside the block; for whoever measures prediction.

    Args:
        around: Given ``"encode"`` or ``"decode"`` and what runs that half; returns what it gives, or something in its
            place.
    """
    global _around
    before, _around = _around, around
    try:
        yield
    finally:
        _around = before


@contextmanager
def served(model: nn.Module, source: Source) -> Iterator[None]:
    """Asks ``source(pixel_values, encode)`` for the image embeddings of this very model inside the block.

    Args:
        model: The model; copies of it are not served.
        source: Gives the embeddings; ``encode()`` computes them.
    """
    before = _sources.get(id(model))
    _sources[id(model)] = source
    try:
        yield
    finally:
        if before is None:
            del _sources[id(model)]
        else:
            _sources[id(model)] = before


@contextmanager
def remembered(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keeps what the encoder of this very model gives inside the block.

    Yields:
        Pixels as they were given, and their embeddings in half precision on the CPU.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def source(pixel_values: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        embedding = encode()
        kept.append((pixel_values, embedding.detach().half().cpu()))
        return embedding

    with served(model, source):
        yield kept


_ELSEWHERE = "carsam_halves"


def run_in(model: nn.Module, halves: Halves | None) -> None:
    """Has a model's halves run elsewhere from here on, or in torch again (None); copies of the model do as it does."""
    model.__dict__[_ELSEWHERE] = halves


def runs_in(model: nn.Module) -> Halves | None:
    """Where a model's halves run; None: in torch."""
    return model.__dict__.get(_ELSEWHERE)


def encode_image(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Image embeddings ``(B, C, h, w)`` of preprocessed images ``(B, 3, S, S)``, on the model's device."""

    def encode() -> Tensor:
        halves = runs_in(model)
        return (
            family_of(model).encode_image(model, pixel_values) if halves is None else halves.encode_image(pixel_values)
        )

    source = _sources.get(id(model))
    return _around("encode", encode if source is None else lambda: source(pixel_values, encode))


def predict_logits(
    model: nn.Module,
    image_embeddings: Tensor,
    *,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    multimask_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decodes B prompts of one image, with segment-anything's batching.

    Args:
        model: The model.
        image_embeddings: ``(1, C, h, w)``.
        points: ``(B, N, 2)`` as (x, y) in pixels of the input frame.
        labels: ``(B, N)``: 1 foreground, 0 background, -1 no point.
        boxes: ``(B, 4)`` or ``(B, 1, 4)`` XYXY in pixels of the input frame.
        masks: Logits ``(B, 1, h, w)`` or ``(1, 1, h, w)`` of an earlier prediction.
        multimask_output: Three masks a prompt instead of one.

    Returns:
        Low-resolution logits ``(B, M, h, w)`` and predicted IoU ``(B, M)``, float32. Zero prompts give zero masks.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, a label is unknown, or a box is upside down.
    """
    prompts = {"points": points, "labels": labels, "boxes": boxes, "masks": masks}
    halves, family = runs_in(model), family_of(model)
    if halves is None:
        run = partial(family.predict_logits, model, image_embeddings, **prompts, multimask_output=multimask_output)
        return _around("decode", run)
    check_prompts(halves.mask_side, **prompts)
    masks_and_iou = _around("decode", partial(halves.all_masks, image_embeddings, **prompts))
    return family.chosen_masks(model, *masks_and_iou, multimask_output)
