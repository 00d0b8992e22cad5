"""carsam: Segment Anything in 4 bits.

>>> import carsam
>>> result = carsam.quantize("facebook/sam-vit-base", "images/", out="sam-b-w4a4")
>>> predictor = carsam.SamPredictor(carsam.load("sam-b-w4a4"))
"""

import os
import sys
from pathlib import Path

__version__ = "0.1.0"

# Threads that wait must sleep, not spin: beside any other busy process, OpenMP's spinning makes the thousands of small
# operations here up to a hundred times slower. Read when torch is loaded; of no effect where it already is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The command line answers --help without the seconds that torch and transformers take to import; its commands import
# what they need by module. Everywhere else, importing carsam also teaches transformers to load packed folders.
if Path(sys.argv[0]).stem != "carsam":
    from carsam import errors
    from carsam.automatic_masks import SamAutomaticMaskGenerator
    from carsam.config import BitPlan, Bits, CalibrationConfig, QuantizeConfig
    from carsam.data.calibration import CalibrationImage, CalibrationSet, calibration_set
    from carsam.data.images import read_image
    from carsam.evaluate.coco_metrics import CocoResult, evaluate_coco
    from carsam.models.load import load_model
    from carsam.pack.checkpoint import load
    from carsam.pipeline import QuantizeResult, quantize
    from carsam.predictor import SamPredictor
    from carsam.segment_anything import as_segment_anything

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
    "as_segment_anything",
    "calibration_set",
    "errors",
    "evaluate_coco",
    "load",
    "load_model",
    "quantize",
    "read_image",
]
