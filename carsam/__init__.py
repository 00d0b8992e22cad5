"""carsam: Segment Anything in 4 bits.

>>> import carsam
>>> result = carsam.quantize("facebook/sam-vit-base", "images/", out="sam-b-w4a4")
>>> predictor = carsam.SamPredictor(carsam.load("sam-b-w4a4"))

After ``import carsam``, transformers' ``SamModel.from_pretrained`` loads packed folders too. Torch and transformers are
imported when a name of this module is first used, so that ``import carsam`` and ``carsam --help`` answer at once.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from carsam import errors
from carsam.pack.registration import register_on_import
from carsam.version import __version__ as __version__

if TYPE_CHECKING:
    from carsam.bits.plan import BitPlan, Bits
    from carsam.config import CalibrationConfig, QuantizeConfig
    from carsam.data.images.reading import read_image
    from carsam.evaluate.coco_metrics import CocoResult, evaluate_coco
    from carsam.evaluate.video import VideoResult, evaluate_videos
    from carsam.models.load import load_model
    from carsam.pack.checkpoint import load
    from carsam.pipeline import QuantizeResult, quantize
    from carsam.predict.automatic_masks import SamAutomaticMaskGenerator
    from carsam.predict.predictor import SamPredictor
    from carsam.predict.segment_anything import as_segment_anything
    from carsam.predict.video import SamVideoPredictor
    from carsam.prompts.calibration import CalibrationImage, CalibrationSet, calibration_set

# Threads that wait spin for a few microseconds and then sleep. OpenMP's own spinning makes the thousands of small
# operations here up to a hundred times slower beside any other busy process; sleeping at once makes two threads slower
# than one on an idle machine (`fast` for the embedded model: 184 s, 115 s with the spin, 133 s with one thread). Read
# when torch is loaded; of no effect where it already is.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

register_on_import()

# Where each public name is defined: imported when it is first used (PEP 562). Type checkers read the imports above.
_PLACES = {
    "BitPlan": "carsam.bits.plan",
    "Bits": "carsam.bits.plan",
    "CalibrationConfig": "carsam.config",
    "CalibrationImage": "carsam.prompts.calibration",
    "CalibrationSet": "carsam.prompts.calibration",
    "CocoResult": "carsam.evaluate.coco_metrics",
    "QuantizeConfig": "carsam.config",
    "QuantizeResult": "carsam.pipeline",
    "SamAutomaticMaskGenerator": "carsam.predict.automatic_masks",
    "SamPredictor": "carsam.predict.predictor",
    "SamVideoPredictor": "carsam.predict.video",
    "as_segment_anything": "carsam.predict.segment_anything",
    "calibration_set": "carsam.prompts.calibration",
    "VideoResult": "carsam.evaluate.video",
    "evaluate_coco": "carsam.evaluate.coco_metrics",
    "evaluate_videos": "carsam.evaluate.video",
    "load": "carsam.pack.checkpoint",
    "load_model": "carsam.models.load",
    "quantize": "carsam.pipeline",
    "read_image": "carsam.data.images.reading",
}

__all__ = [
    "BitPlan",
    "Bits",
    "CalibrationConfig",
    "CalibrationImage",
    "CalibrationSet",
    "CocoResult",
    "QuantizeConfig",
    "QuantizeResult",
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "SamVideoPredictor",
    "VideoResult",
    "as_segment_anything",
    "calibration_set",
    "errors",
    "evaluate_coco",
    "evaluate_videos",
    "load",
    "load_model",
    "quantize",
    "read_image",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
