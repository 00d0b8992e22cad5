"""A model, float or packed, with the interface of ``segment_anything.modeling.Sam``.

Code that was written for segment-anything (its ``SamPredictor``, its ``SamAutomaticMaskGenerator``, its notebooks)
takes the object of :func:`as_segment_anything` in the place of its own model.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from carsam.errors import CheckpointError
from carsam.models.family import families, family_of


def as_segment_anything(model: PreTrainedModel | str | Path) -> nn.Module:
    """Gives a model the interface of ``segment_anything.modeling.Sam``.

    Args:
        model: A model, float or packed, or the folder, file or Hub id of one.

    Raises:
        ValueError: It is something else.
        CarsamError: There is no such model, or it is damaged.
    """
    sam = as_sam_model(model)
    return family_of(sam).as_segment_anything(sam)


def as_sam_model(model: nn.Module | str | Path, runtime: str | None = None) -> PreTrainedModel:
    """The transformers model of whatever stands for one.

    Args:
        model: A model, float or packed, or the folder, file or Hub id of one.
        runtime: Where it computes from here on (see :func:`carsam.load`); None leaves a model as it is.

    Raises:
        ValueError: It is something else.
        CarsamError: There is no such model, or it is damaged.
    """
    if isinstance(model, (str, Path)):
        return _open(model, runtime or "torch")
    own = getattr(model, "sam_model", None)
    known = own if isinstance(own, PreTrainedModel) else model if isinstance(model, PreTrainedModel) else None
    if known is not None:
        from carsam.runtime.choose import use_runtime

        known = known if known is own else require_known(known)
        return known if runtime is None else use_runtime(known, runtime)
    if isinstance(model, nn.Module) and _is_published(model):
        raise ValueError(
            "this is segment-anything's own model; save its weights with torch.save(sam.state_dict(), 'sam.pth') and "
            "open them with carsam.load_model('sam.pth')."
        )
    raise ValueError(
        f"a model is needed, not {type(model).__name__}; open one with carsam.load(...) or carsam.load_model(...)."
    )


def _is_published(model: nn.Module) -> bool:
    """Whether it holds what a published checkpoint holds."""
    state = model.state_dict()
    return any(family.find_state(state, "the model") is not None for family in families().values())


def _open(source: str | Path, runtime: str) -> PreTrainedModel:
    from carsam.pack.checkpoint import open_model

    return open_model(source, runtime=runtime)


def require_known(model: PreTrainedModel) -> PreTrainedModel:
    """A model of transformers that carsam can run.

    Raises:
        ValueError: It is of another kind.
    """
    try:
        family_of(model)
    except CheckpointError as error:
        raise ValueError(f"a model is needed that carsam knows: {error}") from error
    return model
