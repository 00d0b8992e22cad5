"""How much each site alone costs: the float model with one weight or activation rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from carsam.calibrate.site_errors import SiteErrors, every_part, relative_error
from carsam.diagnose.results import SiteSensitivity
from carsam.evaluate.points import mask_iou
from carsam.models.sites import Sites
from carsam.prompts.image import PromptedImage

# Images that sensitivity is measured on: every one costs a pass for every site.
MAX_IMAGES = 4


def sensitivity(
    base: nn.Module,
    rounded: nn.Module,
    sites: Sites,
    samples: tuple[PromptedImage, ...],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[SiteSensitivity, ...]:
    """Rounds every site alone and measures the masks.

    Args:
        base: The float model that ``rounded`` was made from, with quantizers' places; changed only while a site is
            tried.
        rounded: Nearest rounding of it.
        sites: The sites of both models.
        samples: Images with prompts.
        progress: Called as ``progress(sites_done, n_sites)``.

    Returns:
        One entry a part, in execution order.
    """
    errors, results = SiteErrors(base, sites, samples), []
    for part, found in every_part(rounded, sites, errors, progress):
        pairs = [pair for each in zip(found, errors.targets) for pair in zip(*each)]
        ious = [mask_iou((logits > 0).cpu().numpy(), (target > 0).cpu().numpy()) for logits, target in pairs]
        error = relative_error(found, errors.targets)
        results.append(SiteSensitivity(part.site, part.kind, part.bits, error, sum(ious) / len(ious)))
    return tuple(results)
