"""What a diagnosis holds: ``diagnosis.json``, which the report is made from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

FORMAT = 1


def plain(value: Any) -> Any:
    """Dataclasses as mappings (a trailing underscore goes from names), tuples as lists, for JSON.

    Floats keep six digits; what is not finite (a model that diverged) becomes None.
    """
    if is_dataclass(value):
        return {f.name.rstrip("_"): plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        # Adding zero takes the sign from −0.
        return float(f"{value:.6g}") + 0.0 if math.isfinite(value) else None
    return value


@dataclass(frozen=True)
class Dissipation:
    """One head, or the mean over heads; means over images, prompts and queries.

    Attributes:
        entropy_float, entropy_quantized: In nats.
        entropy_change: Quantized minus float.
        kl: KL(P‖P̂) in nats.
        focus_overlap: IoU 0..1 of the keys above half of the row's maximum.
        row_sum: Mean sum of a quantized row; 1 unless the grid loses mass.
        dead_rows: Share of quantized rows that are all zero.
    """

    entropy_float: float
    entropy_quantized: float
    entropy_change: float
    kl: float
    focus_overlap: float
    row_sum: float
    dead_rows: float


@dataclass(frozen=True)
class AttentionResult:
    """An attention, float against quantized, each on its own model's activations.

    Attributes:
        name: Module path.
        stage: ``encoder`` or ``decoder``.
        queries, keys: How many there are in one window, image or prompt.
        mean: Over heads.
        heads: One by one.
    """

    name: str
    stage: str
    queries: int
    keys: int
    mean: Dissipation
    heads: tuple[Dissipation, ...]

    def to_dict(self) -> dict[str, Any]:
        """The means beside the name, as the report reads them."""
        head = {"name": self.name, "stage": self.stage, "queries": self.queries, "keys": self.keys}
        return {**head, **plain(self.mean), "heads": plain(self.heads)}


@dataclass(frozen=True)
class HeatMap:
    """The mask token's attention over an image, mean over heads.

    Attributes:
        attention: Module path.
        image: File name.
        box: The prompt, XYXY in pixels of the image file.
        float_, quantized: Pictures, relative to the diagnosis folder; both scaled to the float map's maximum.
        entropy_float, entropy_quantized, kl, focus_overlap: Measures of the mask token's rows, means over heads.
    """

    attention: str
    image: str
    box: tuple[float, ...]
    float_: str
    quantized: str
    entropy_float: float
    entropy_quantized: float
    kl: float
    focus_overlap: float


@dataclass(frozen=True)
class Moment:
    """The decoder while its reconstruction went on.

    Attributes:
        after: ``nearest rounding``, ``encoder``, or the unit that was finished last.
        errors: Relative squared error of every stage.
        total_variation: Total variation of their logarithms.
    """

    after: str
    errors: tuple[float, ...]
    total_variation: float


@dataclass(frozen=True)
class Neighbour:
    """A stage's relative error before and after the unit of the attention that it is coupled with."""

    stage: str
    neighbour: str
    before: float
    after: float


@dataclass(frozen=True)
class Oscillation:
    """The relative error along the decoder's stages, in execution order.

    Attributes:
        stages: Paths below the decoder's transformer; each stands for its output after residual and norm.
        moments: From nearest rounding to the finished model.
        errors, total_variation: The same for the packed model.
        neighbours: Coupled attentions.
    """

    stages: tuple[str, ...]
    moments: tuple[Moment, ...]
    errors: tuple[float, ...]
    total_variation: float
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Histogram:
    """Counts of a sample in bins of equal width from ``low`` to ``high``."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SiteValues:
    """What an activation site of the packed model sees.

    Attributes:
        site: Its name.
        grid: Kind of grid.
        bits: Bits of a code.
        low, high: Exact ends of the values seen.
        grid_low, grid_high: Ends of the grid; None where a site has several grids, or one for each row.
        clipped: Share 0..1 of the values beyond the grid.
        modes: Number of modes of their density.
        histogram: Histogram of a sample.
    """

    site: str
    grid: str
    bits: int
    low: float
    high: float
    grid_low: float | None
    grid_high: float | None
    clipped: float
    modes: int
    histogram: Histogram


@dataclass(frozen=True)
class WeightResult:
    """A layer's quantized weights.

    Attributes:
        site: Module path.
        bits: Bits of a code.
        parameters: Number of weights.
        error: Relative squared error against the float weights; None where the method changed them beyond comparison.
    """

    site: str
    bits: int
    parameters: int
    error: float | None


@dataclass(frozen=True)
class SiteSensitivity:
    """The float model with one site rounded to nearest, all else in floating point.

    Attributes:
        site: Its name.
        kind: ``weight`` or ``activation``.
        bits: Bits of a code.
        error: Relative squared error of the mask logits.
        iou: Mean IoU 0..1 of the masks with the float model's.
    """

    site: str
    kind: str
    bits: int
    error: float
    iou: float


@dataclass(frozen=True)
class PromptScore:
    """A box prompt, XYXY in pixels of the image file, and IoU 0..1 of both models' masks with the reference."""

    box: tuple[float, ...]
    iou_float: float
    iou_quantized: float


@dataclass(frozen=True)
class Zoom:
    """A small object of an example, cut out and enlarged.

    Attributes:
        prompt: Its number among the example's prompts, from 1.
        region: What is shown, XYXY in pixels of the image file.
        float_, quantized, truth: Pictures, relative to the diagnosis folder; ``truth`` is None without ground truth.
    """

    prompt: int
    region: tuple[int, int, int, int]
    float_: str
    quantized: str
    truth: str | None


@dataclass(frozen=True)
class Example:
    """An image with its masks.

    Attributes:
        role: ``worst`` or ``median`` of the images by what quantization lost.
        image: File name.
        float_, quantized, truth: Pictures, relative to the diagnosis folder; ``truth`` is None without ground truth.
        mean_iou_float, mean_iou_quantized: 0..1.
        prompts: One by one.
        zooms: Its small objects that changed most.
    """

    role: str
    image: str
    float_: str
    quantized: str
    truth: str | None
    mean_iou_float: float
    mean_iou_quantized: float
    prompts: tuple[PromptScore, ...]
    zooms: tuple[Zoom, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """Everything that ``carsam diagnose`` finds.

    Attributes:
        float_, quantized: The models, as given.
        method, bits: Method and bits of the packed model.
        n_images, n_prompts: What it was measured on.
        reference: What masks are scored against: ``ground truth`` or ``float model's masks``.
        mean_iou_float, mean_iou_quantized: 0..1, over all prompts.
        attentions: In execution order.
        heat_maps: Heat maps of the first prompt of each example.
        oscillation: Along the decoder.
        units: Reconstruction reports of ``results.json``; empty where it has none.
        sites, weights: Every activation site and every layer.
        sensitivity: Every site alone; empty where it was left out.
        examples: Masks side by side.
    """

    float_: str
    quantized: str
    method: str
    bits: str
    n_images: int
    n_prompts: int
    reference: str
    mean_iou_float: float
    mean_iou_quantized: float
    attentions: tuple[AttentionResult, ...]
    heat_maps: tuple[HeatMap, ...]
    oscillation: Oscillation
    units: tuple[dict[str, Any], ...]
    sites: tuple[SiteValues, ...]
    weights: tuple[WeightResult, ...]
    sensitivity: tuple[SiteSensitivity, ...]
    examples: tuple[Example, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings and lists, for JSON."""
        values = {"format": FORMAT, **plain(self)}
        return {**values, "attentions": [attention.to_dict() for attention in self.attentions]}
