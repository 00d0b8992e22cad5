"""Registration with transformers: after ``import carsam``, ``SamModel.from_pretrained(DIR)`` loads a packed folder.

Without the import, transformers warns of an unknown ``quant_method`` and tries to go on; the packed ``weight`` tensors
are one-dimensional, so it stops at their shapes (see :class:`carsam.pack.layers.PackedLayer`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from carsam.errors import CheckpointError
from carsam.pack.layers import PackedLayer
from carsam.pack.layout import FORMAT_VERSION, build_packed
from carsam.quantizers import SiteQuantizer

METHOD = "carsam"


@register_quantization_config(METHOD)
class CarsamQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed folder: the layout and where it came from.

    Args:
        layout: See :func:`carsam.pack.layout.describe`.
        bits: Default bits as ``w4a4``.
        method: Name of the method.
        carsam_version: That wrote it.
        format: Version of the layout.
    """

    def __init__(
        self,
        layout: dict[str, Any],
        bits: str = "",
        method: str = "",
        carsam_version: str = "",
        format: int = FORMAT_VERSION,
        **_: Any,
    ):
        if format != FORMAT_VERSION:
            raise CheckpointError(
                f"the packed folder has format {format}, this carsam reads {FORMAT_VERSION}; install the carsam that "
                f"wrote it ({carsam_version or 'unknown'}) or quantize again."
            )
        self.quant_method = METHOD
        self.layout, self.bits, self.method = layout, bits, method
        self.carsam_version, self.format = carsam_version, format

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.__dict__)


@register_quantizer(METHOD)
class CarsamHfQuantizer(HfQuantizer):
    """Builds the packed form before transformers loads the tensors, and checks it afterwards."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        build_packed(model, self.quantization_config.layout)
        # Before loading: transformers makes up what a file lacks, and only logs it.
        check_tensors(model, kwargs.get("checkpoint_files") or ())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_complete(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def check_tensors(model: PreTrainedModel, files: Sequence[str]) -> None:
    """Refuses files that do not hold exactly the tensors of a packed model.

    Args:
        model: From :func:`carsam.pack.layout.build_packed`.
        files: The files that its tensors will be loaded from; none where they come from memory.

    Raises:
        CheckpointError: A tensor is missing, or there is one that the model has no place for.
    """
    if not files:
        return
    found: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found.update(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a safetensors file, or damaged; get it again. ({error})") from error
    expected = set(model.state_dict())
    tied = set(model._tied_weights_keys or ())
    wrong = sorted((expected - tied - found) | (found - expected))
    if wrong:
        raise CheckpointError(
            f"{', '.join(str(path) for path in files)} does not hold the tensors that config.json describes: missing "
            f"or unexpected {', '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; it is "
            "damaged, get it again."
        )


def check_complete(model: nn.Module) -> None:
    """Refuses a packed model with a grid that was never loaded.

    Raises:
        CheckpointError: A scale is missing, not finite or not positive.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            scale = module.weight_scale
        elif isinstance(module, SiteQuantizer) and module.bits < 16:
            scale = module.scale
        else:
            continue
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise CheckpointError(f"the packed folder has no usable scale for {name}; it is damaged, get it again.")
