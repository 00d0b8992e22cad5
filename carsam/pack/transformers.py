"""Registration with transformers: after ``import carsam``, its ``from_pretrained`` loads packed folders.

Without the import, transformers warns of the unknown ``quant_method: carsam`` and stops before it builds the model,
with an error that says to import carsam (see :data:`carsam.models.implementations.NOTICE`). Where a caller names
another attention, it stops at the packed ``weight`` tensors, which are one-dimensional (see
:class:`carsam.pack.layers.PackedLayer`).

This module is imported at the moment when transformers' models are, perhaps by a module of carsam that is itself only
half imported. So it imports nothing of carsam that imports a model; its methods do when they are called.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from carsam.errors import CheckpointError
from carsam.models.implementations import NOTICE
from carsam.pack.folder import FORMAT_VERSION, METHOD

# What config.json asks for exists where carsam is imported: transformers' eager attention, which the packed form then
# replaces wherever there is one.
ALL_ATTENTION_FUNCTIONS.register(NOTICE, ALL_ATTENTION_FUNCTIONS["sdpa"])


@register_quantization_config(METHOD)
class CarsamQuantizationConfig(QuantizationConfigMixin):
    """The layout of a packed model and where it came from.

    Args:
        layout: See :func:`carsam.pack.layout.describe`.
        bits: Default bits as ``w4a4``.
        method: Name of the method.
        carsam_version: That wrote it.
        format: Version of the layout.

    Raises:
        CheckpointError: The layout is not one, or of a later version.
    """

    def __init__(
        self,
        layout: dict[str, Any] | None = None,
        bits: str = "",
        method: str = "",
        carsam_version: str = "",
        format: int = FORMAT_VERSION,
        **_: Any,
    ):
        from carsam.pack.layout import check_layout

        for name, value in (("bits", bits), ("method", method), ("carsam_version", carsam_version)):
            if not isinstance(value, str):
                raise CheckpointError(f"config.json describes {name} wrongly: it is no text; get the folder again.")
        if type(format) is not int or format != FORMAT_VERSION:
            raise CheckpointError(
                f"the packed folder has format {str(format)[:60]}, this carsam reads {FORMAT_VERSION}; install the "
                f"carsam that wrote it ({carsam_version[:60] or 'unknown'}) or quantize again."
            )
        self.quant_method = METHOD
        self.layout, self.bits, self.method = check_layout(layout), bits, method
        self.carsam_version, self.format = carsam_version, format

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.__dict__)


@register_quantizer(METHOD)
class CarsamHfQuantizer(HfQuantizer):
    """Builds the packed form before transformers loads the tensors, and checks it before and afterwards."""

    requires_calibration = True
    _folder: Path | None = None

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Called before the model is built (by transformers that know this hook): refuses what would take for ever."""
        from carsam.pack.checks import check_sizes

        check_sizes(config, self.quantization_config.layout)
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from carsam.pack.checks import check_tensors, verified_folder
        from carsam.pack.layout import build_packed

        files = [Path(path) for path in kwargs.get("checkpoint_files") or ()]
        if files:
            self._folder = verified_folder(files)
        build_packed(model, self.quantization_config.layout)
        # Before loading: transformers makes up what a file lacks, and only logs it.
        check_tensors(model, files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from carsam.pack.checks import check_values
        from carsam.pack.writing import Facts, attach, read_facts

        check_values(model)
        if model.config._attn_implementation == NOTICE:
            model.config._attn_implementation = "eager"
        config = self.quantization_config
        made = {"carsam_version": config.carsam_version, "method": config.method, "bits": config.bits}
        return attach(model, read_facts(self._folder) if self._folder is not None else Facts(made))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
