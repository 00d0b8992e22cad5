"""Settings of a quantization: bits, method, data. Frozen, saved with every result, readable back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from carsam.bits.plan import BitPlan
from carsam.errors import ConfigError
from carsam.settings import build

if TYPE_CHECKING:
    from carsam.models.sites import Sites

MAX_BOXES = 1000


@dataclass(frozen=True)
class CalibrationConfig:
    """The calibration data.

    Attributes:
        images: Folder of images.
        coco: COCO annotation file whose boxes are the prompts; None lets the model propose boxes.
        n_images: Images to use.
        boxes_per_image: Box prompts of an image.
        box_source: Without a COCO file: ``auto`` (the model's own masks on a grid of points) or ``grid``.
        seed: Choice of images and boxes, and everything random after it.
    """

    images: str = ""
    coco: str | None = None
    n_images: int = 32
    boxes_per_image: int = 6
    box_source: str = "auto"
    seed: int = 0

    def __post_init__(self):
        if self.n_images < 1 or self.boxes_per_image < 1:
            raise ConfigError("n_images and boxes_per_image must be at least 1.")
        if self.boxes_per_image > MAX_BOXES:
            raise ConfigError(f"boxes_per_image must be at most {MAX_BOXES}: an image's boxes go through at once.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("the seed must be a whole number from 0 to 2^63 - 1.")
        if self.box_source not in ("auto", "grid"):
            raise ConfigError(f"unknown box source {self.box_source!r}; choose auto or grid.")


@dataclass(frozen=True)
class QuantizeConfig:
    """Everything that decides the bytes of a packed checkpoint, apart from the model and the images themselves.

    Attributes:
        method: Name of a registered method.
        settings: The method's settings that differ from its defaults (nested mappings for nested settings).
        bits: Default bits, as ``w4a4``.
        overrides: Bits by site pattern.
        calibration: The data.
        normalise: ``imagenet``, ``unit`` or ``min-max`` instead of the model's own normalisation of pixels.
        image_size: Side of the input in pixels, for a checkpoint that does not show it (see :func:`carsam.load_model`).
        decoder_only: Leave the image encoder in floating point: all of its sites have 16 bits.
        budget: Mean bits (``4.0bits``) or size of the weights' file (``6MB``): bits of 3 to 8 are then chosen for every
            site, ``bits`` and ``overrides`` say only what stays in floating point.
    """

    method: str = "car-sam-plus"
    settings: dict[str, Any] = field(default_factory=dict)
    bits: str = "w4a4"
    overrides: dict[str, str] = field(default_factory=dict)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    normalise: str | None = None
    image_size: int | None = None
    decoder_only: bool = False
    budget: str | None = None

    def bit_plan(self, sites: Sites | None = None) -> BitPlan:
        """The parsed bits.

        Args:
            sites: Of the model; without them, ``decoder_only`` has no effect on the plan.
        """
        plan = BitPlan.parse(self.bits, self.overrides)
        return replace(plan, within=sites.decoder) if self.decoder_only and sites is not None else plan

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, for YAML and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizeConfig:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ConfigError: A setting is unknown, of another type, or out of range.
        """
        return build(cls, values)
