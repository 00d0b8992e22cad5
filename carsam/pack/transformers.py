"""Registration with transformers: after ``import carsam``, its ``from_pretrained`` loads packed folders.

Without the import, transformers warns of the unknown ``quant_method: carsam`` and stops before it builds the model,
with an error that says to import carsam (see :data:`carsam.models.implementations.NOTICE`). Where a caller names
another attention, it stops at the packed ``weight`` tensors, which are one-dimensional (see
:class:`carsam.pack.layers.PackedLayer`).

This module is imported at the moment when transformers' models are, perhaps by a module of carsam that is itself only
half imported. So it imports nothing of carsam that imports a model; its methods do when they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from carsam.models.implementations import NOTICE
from carsam.pack.folder import METHOD
from carsam.pack.quantization_config import CarsamQuantizationConfig

register_quantization_config(METHOD)(CarsamQuantizationConfig)
# What config.json asks for exists where carsam is imported: transformers' eager attention, which the packed form then
# replaces wherever there is one.
ALL_ATTENTION_FUNCTIONS.register(NOTICE, ALL_ATTENTION_FUNCTIONS["sdpa"])


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
