"""Compares carsam's loading of Meta's SAM 2 checkpoints with Meta's own package, on weights that the package drew.

Usage: python tools/check_sam2_parity.py sam2.1/sam2.1_hiera_t sam2.1/sam2.1_hiera_l

Builds the model that the package's configuration describes at 1024 px, saves it as Meta does, loads the file and
decodes boxes, points, both, a mask, single and multiple masks. Prints the largest absolute differences of embeddings,
of masks at the image's size and of IoU scores, and exits with 1 where masks or scores differ by more than 1e-4.
tests/models/sam2/test_sam2_parity.py runs the same comparison on small inputs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sam2_package import build, image_predictor  # noqa: E402

from carsam.models.forward import encode_image, predict_logits  # noqa: E402
from carsam.models.load import load_model  # noqa: E402
from carsam.models.sam2.encoder import unfold  # noqa: E402

TOLERANCE, SIDE, SIZE = 1e-4, 1024, (480, 640)
CONFIGS = tuple(f"{version}/{version}_hiera_{size}" for version in ("sam2.1", "sam2") for size in ("t", "s", "b+", "l"))


def prompts(seed: int = 1) -> list[dict[str, Tensor]]:
    """Two objects by each kind of prompt, and one by a mask alone; in pixels of the input."""
    boxes = torch.tensor([[100.0, 200.0, 500.0, 640.0], [30.5, 17.25, 1000.0, 900.0]])
    points = torch.tensor([[[350.0, 420.0], [120.0, 800.5]], [[10.0, 10.0], [512.0, 512.0]]])
    clicks = {"points": points, "labels": torch.tensor([[1, 0], [1, 1]])}
    mask = torch.randn(1, 1, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(seed))
    return [{"boxes": boxes}, clicks, {"boxes": boxes, **clicks}, {"masks": mask}]


@torch.no_grad()
def differences(meta: nn.Module, ours: PreTrainedModel) -> tuple[float, float, float]:
    """Largest absolute differences of embeddings, masks and scores."""
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    predictor, embedding = image_predictor(meta, pixels, SIZE), encode_image(ours, pixels)
    *finer, coarse = unfold(embedding)
    # Meta's embedding has that of "no memory" added already.
    pairs = [(coarse + meta.no_mem_embed.view(1, -1, 1, 1), predictor.get_image_embedding())]
    pairs += list(zip(finer, predictor._features["high_res_feats"]))
    embeddings = max((mine - theirs).abs().max().item() for mine, theirs in pairs)
    masks = scores = 0.0
    for prompt in prompts():
        for several in (False, True):
            theirs = predictor._predict(
                *(prompt.get(name) for name in ("points", "labels", "boxes", "masks")),
                multimask_output=several,
                return_logits=True,
            )
            logits, iou = predict_logits(ours, embedding, **prompt, multimask_output=several)
            mine = F.interpolate(logits, SIZE, mode="bilinear", align_corners=False)
            masks = max(masks, (mine - theirs[0]).abs().max().item())
            scores = max(scores, (iou - theirs[1]).abs().max().item())
    return embeddings, masks, scores


def main() -> int:
    """Prints a table; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=list(CONFIGS), metavar="CONFIG", help=", ".join(CONFIGS))
    worst = 0.0
    print("| configuration | parameters | embeddings | masks | IoU scores |\n| --- | --- | --- | --- | --- |")
    for config in parser.parse_args().configs:
        meta = build(config, SIDE)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt"
            torch.save({"model": meta.state_dict()}, path)
            ours = load_model(path)
        found = differences(meta, ours)
        worst = max(worst, *found[1:])
        values = " | ".join(f"{value:.1e}" for value in found)
        print(f"| {config} | {ours.num_parameters() / 1e6:.1f} M | {values} |", flush=True)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
