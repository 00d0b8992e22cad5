"""Where the repository keeps what tests read: the embedded model and its images."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "embedded"
NANO = EMBEDDED / "sam-nano-256"
SAM2_NANO = NANO.parent / "sam2-nano-256"
CALIBRATION, EVALUATION = EMBEDDED / "images" / "calibration", EMBEDDED / "images" / "evaluation"
CALIBRATION_IMAGES, CALIBRATION_COCO = CALIBRATION / "images", CALIBRATION / "instances.json"
EVALUATION_IMAGES, EVALUATION_COCO = EVALUATION / "images", EVALUATION / "instances.json"
