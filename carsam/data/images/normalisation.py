"""What becomes of pixels before a model sees them: subtract a mean, divide by a deviation, or stretch to 0..1.

A model brings its own: ``preprocessor_config.json`` of a transformers folder, ``pixel_mean`` and ``pixel_std`` of a
checkpoint in Meta's form. It stays with the model's configuration, so it survives copies and saving.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedModel

from carsam.errors import CheckpointError, ConfigError

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

PREPROCESSOR = "preprocessor_config.json"
# Buffers that some checkpoints save: what the model's pixels are normalised with.
BUFFERS = ("pixel_mean", "pixel_std")
# Our own key in preprocessor_config.json and in a model's configuration; transformers leaves it alone.
KEY = "carsam_normalisation"
CONSTANTS, MIN_MAX = "constants", "min-max"
# Values rounded to six digits, as packed folders of before have them, are within this of the exact ones.
_ROUNDED = 1e-4
_LARGEST_CONFIG = 2**20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Normalisation:
    """How pixels become a model's input.

    The arithmetic is that of whoever defined the constants, step by step, because a packed model amplifies differences
    in the last digit: first ``factor`` (in float64, rounded to float32, as transformers does), then mean and deviation
    in float32.

    Attributes:
        mean: Per channel, subtracted after the factor.
        std: Per channel, divided by.
        factor: What pixels on 0..255 are multiplied by first; None leaves them.
        kind: ``constants``, or ``min-max``: each image is stretched so that its least value becomes 0 and its greatest
            1 (MedSAM's own preprocessing); the three others are not used then.
    """

    mean: Triple = PIXEL_MEAN
    std: Triple = PIXEL_STD
    factor: float | None = None
    kind: str = CONSTANTS

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalises pixels ``(B, 3, h, w)`` on the scale 0..255; gives float32."""
        if self.kind == MIN_MAX:
            values = pixels.float()
            low, high = values.amin((-3, -2, -1), keepdim=True), values.amax((-3, -2, -1), keepdim=True)
            return (values - low) / (high - low).clamp(min=1e-8)
        values = pixels.float() if self.factor is None else (_wide(pixels) * self.factor).float().to(pixels.device)
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (values - mean) / std

    @property
    def pixel_mean(self) -> Triple:
        """The mean on the scale 0..255, as segment-anything's ``pixel_mean``."""
        return _triple(value / (self.factor or 1.0) for value in self.mean)

    @property
    def pixel_std(self) -> Triple:
        """The deviation on the scale 0..255, as segment-anything's ``pixel_std``."""
        return _triple(value / (self.factor or 1.0) for value in self.std)

    def describe(self) -> str:
        """In words, for reports and model cards."""
        if self.kind == MIN_MAX:
            return "each image stretched to 0..1"
        if self == IMAGENET:
            return "ImageNet's mean and deviation"
        if self == UNIT:
            return "pixels scaled to 0..1"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.pixel_mean, self.pixel_std))
        return f"mean {mean}, deviation {std} (of 255)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a model's configuration."""
        return {"kind": self.kind, "mean": list(self.mean), "std": list(self.std), "factor": self.factor}


def _wide(pixels: Tensor) -> Tensor:
    """The pixels in float64, on the CPU where the device has none (Apple's)."""
    return (pixels.cpu() if pixels.device.type == "mps" else pixels).double()


IMAGENET = Normalisation()
UNIT = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1 / 255)
STRETCHED = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1 / 255, MIN_MAX)
NAMED = {"imagenet": IMAGENET, "unit": UNIT, "min-max": STRETCHED}


def named_normalisation(name: str) -> Normalisation:
    """The normalisation of ``--normalise``.

    Raises:
        ConfigError: There is no such name.
    """
    if name not in NAMED:
        raise ConfigError(f"there is no normalisation {name!r}; choose one of {', '.join(NAMED)}.")
    return NAMED[name]


def set_normalisation(model: PreTrainedModel, normalisation: Normalisation) -> None:
    """Gives a model its normalisation. It lies in the configuration, so copies and saved folders have it too."""
    model.config.__dict__.pop(KEY, None)
    # ImageNet's goes without saying, unless the folder that the model came from says otherwise.
    if normalisation != IMAGENET or normalisation_of(model) != IMAGENET:
        setattr(model.config, KEY, normalisation.to_dict())


def normalisation_of(model: PreTrainedModel) -> Normalisation:
    """The normalisation of a model, whether carsam or transformers loaded it.

    A model that ``from_pretrained`` loaded from a folder has the folder's ``preprocessor_config.json``.
    Without any of its own, it is ImageNet's, as Meta's models have.

    Raises:
        CheckpointError: What the model or its folder says is no normalisation.
    """
    own = getattr(model.config, KEY, None)
    if own is not None:
        return from_dict(own, "the model's configuration")
    source = str(getattr(model.config, "_name_or_path", "") or "")
    if not source:
        return IMAGENET
    path = Path(source) / PREPROCESSOR
    if not Path(source).exists() and HUB_ID.fullmatch(source):
        cached = try_to_load_from_cache(source, PREPROCESSOR)  # what transformers' from_pretrained took of the Hub
        path = Path(cached) if isinstance(cached, str) else path
    return (read_normalisation(path) if path.is_file() else None) or IMAGENET


def from_dict(values: object, source: str) -> Normalisation:
    """The inverse of :meth:`Normalisation.to_dict`.

    Raises:
        CheckpointError: The values are none.
    """
    if not isinstance(values, Mapping) or values.get("kind") not in (CONSTANTS, MIN_MAX):
        raise CheckpointError(f"{source}: {KEY} is {_show(values)}, which is no normalisation.")
    if values["kind"] == MIN_MAX:
        return STRETCHED
    factor = values.get("factor")
    return Normalisation(
        _numbers(values.get("mean"), f"{KEY}.mean", source, positive=False),
        _numbers(values.get("std"), f"{KEY}.std", source, positive=True),
        None if factor is None else _factor(factor, f"{KEY}.factor", source),
    )


def from_buffers(mean: object, std: object, source: str) -> Normalisation:
    """The normalisation of ``pixel_mean`` and ``pixel_std`` in a checkpoint of Meta's form.

    Args:
        mean, std: Tensors of three numbers on the scale 0..255, in any shape and dtype; None where there is none.
        source: What errors call the file.

    Raises:
        CheckpointError: One is there without the other, or they are not three usable numbers.
    """
    if mean is None and std is None:
        return IMAGENET
    if mean is None or std is None:
        there, lacking = ("pixel_std", "pixel_mean") if mean is None else ("pixel_mean", "pixel_std")
        raise CheckpointError(
            f"{source} holds {there} without {lacking}, so its pixels cannot be normalised; add {lacking} to the file, "
            "or delete both from it for ImageNet's."
        )
    values = Normalisation(
        _numbers(_listed(mean), "pixel_mean", source, positive=False),
        _numbers(_listed(std), "pixel_std", source, positive=True),
    )
    for kind in (torch.float16, torch.bfloat16):  # buffers were rounded with the weights
        rounded = [_triple(torch.tensor(v, dtype=kind).tolist()) for v in (PIXEL_MEAN, PIXEL_STD)]
        if rounded == [values.mean, values.std]:
            return IMAGENET
    return _canonical(values)


def read_normalisation(path: Path, image_size: int | None = None) -> Normalisation | None:
    """What a ``preprocessor_config.json`` says.

    Args:
        path: The file.
        image_size: Side of the model's input, which the file's sizes must fit.

    Returns:
        The normalisation; None where the file says nothing of one.

    Raises:
        CheckpointError: The file is no JSON mapping, or a value in it cannot be used.
    """
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a preprocessor_config.json has a few.")
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON; get it again, or delete it for ImageNet's values.") from error
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{path} holds no settings; get it again, or delete it for ImageNet's values.")
    if image_size is not None:
        _check_size(config, image_size, path)
    return from_preprocessor(config, str(path))


def from_preprocessor(config: Mapping[str, Any], source: str) -> Normalisation | None:
    """The normalisation that the settings of a ``SamImageProcessor`` describe; None where they describe none.

    Raises:
        CheckpointError: A value cannot be used.
    """
    if config.get(KEY) is not None:
        return from_dict(config[KEY], source)
    mentioned = ("do_normalize", "do_rescale", "rescale_factor", "image_mean", "image_std")
    if not any(name in config for name in mentioned):
        return None
    do_rescale = _flag(config, "do_rescale", source)
    do_normalize = _flag(config, "do_normalize", source)
    given = config.get("rescale_factor", 1 / 255)
    factor = _factor(given, "rescale_factor", source) if do_rescale else None
    if do_normalize:
        defaults = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        mean, std = ({**defaults, **config}[name] for name in defaults)
        mean = _numbers(mean, "image_mean", source, positive=False)
        std = _numbers(std, "image_std", source, positive=True)
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return _canonical(Normalisation(mean, std, factor))


def to_preprocessor(normalisation: Normalisation) -> dict[str, Any]:
    """Settings of ``SamImageProcessor`` that give the same pixels, bit for bit, from the same resized image.

    Constants on the scale 0..255 are written as such (``do_rescale`` off): dividing by 255 first would round twice.
    transformers has no ``min-max``; the nearest it has, pixels on 0..1, stands beside carsam's own key.
    """
    settings = {
        "do_normalize": normalisation.kind == CONSTANTS,
        "do_rescale": normalisation.factor is not None,
        "image_mean": list(normalisation.mean),
        "image_std": list(normalisation.std),
        "rescale_factor": normalisation.factor or 1 / 255,
    }
    return {**settings, KEY: normalisation.to_dict()} if normalisation.kind == MIN_MAX else settings


def _canonical(values: Normalisation) -> Normalisation:
    """The same normalisation, as the constant that it is where it is one up to rounding."""
    for constant in (IMAGENET, UNIT):
        pairs = zip((*values.pixel_mean, *values.pixel_std), (*constant.pixel_mean, *constant.pixel_std))
        if all(math.isclose(a, b, rel_tol=_ROUNDED, abs_tol=_ROUNDED) for a, b in pairs):
            return constant
    return values


def _check_size(config: Mapping[str, Any], image_size: int, path: Path) -> None:
    """Refuses sizes with which transformers would feed this model other pictures than carsam does."""
    if config.get("do_resize", True) is False:
        raise CheckpointError(
            f"{path} says do_resize: false; carsam resizes images to the model's {image_size} pixels."
        )
    size, pad = config.get("size"), config.get("pad_size")
    for name, value, keys in (("size", size, ("longest_edge",)), ("pad_size", pad, ("height", "width"))):
        sides = value if isinstance(value, Mapping) else {} if value is None else dict.fromkeys(keys, value)
        wrong = {key: side for key, side in sides.items() if side is not None and side != image_size}
        if wrong:
            key, side = next(iter(wrong.items()))
            raise CheckpointError(
                f"{path} says {name}.{key} {_show(side)}, but the model takes images of {image_size} pixels. Set it to "
                f"{image_size}, or delete the file for ImageNet's values and the model's own size."
            )


def _flag(config: Mapping[str, Any], name: str, source: str) -> bool:
    value = config.get(name, True)
    value = True if value is None else value
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: {name} is {_show(value)}; it must be true or false.")
    return value


def _factor(value: object, name: str, source: str) -> float:
    if not _is_number(value) or not 1e-9 <= float(value) <= 1e9:
        raise CheckpointError(f"{source}: {name} is {_show(value)}; it must be a positive number such as 1/255.")
    return float(value)


def _numbers(values: object, name: str, source: str, *, positive: bool) -> Triple:
    """Three usable numbers; one number stands for all three, as in transformers."""
    listed = [values] * 3 if _is_number(values) else values
    kind = "three positive numbers" if positive else "three numbers"
    if not isinstance(listed, Sequence) or isinstance(listed, str) or len(listed) != 3:
        raise CheckpointError(f"{source}: {name} is {_show(values)}; it must be {kind}, one a channel.")
    for value in listed:
        # In float32 the value must still be one: a deviation of 1e-60 would divide by zero.
        if not _is_number(value) or not abs(float(value)) < 1e9 or (positive and not float(value) > 1e-9):
            raise CheckpointError(f"{source}: {name} is {_show(values)}; it must be {kind}, one a channel.")
    return _triple(listed)


def _is_number(value: object) -> bool:
    # An integer of JSON may be larger than any float.
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18)


def _listed(values: object) -> object:
    if isinstance(values, (Tensor, np.ndarray)):
        flat = values.reshape(-1)
        return [float(v) for v in flat[:4].tolist()] if flat.shape[0] > 0 else []
    return list(values) if isinstance(values, (list, tuple)) else values


def _triple(values: Any) -> Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
