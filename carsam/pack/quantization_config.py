"""``quantization_config`` of a packed folder's ``config.json``, as transformers sees it."""

from __future__ import annotations

import copy
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from carsam.errors import CheckpointError
from carsam.pack.folder import FORMAT_VERSION, METHOD


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
        from carsam.pack.layout import check_layout  # not before: see carsam.pack.transformers

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
