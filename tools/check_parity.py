"""Compares carsam's loading of Meta checkpoints with Meta's own package, on weights that the package initialised.

Usage: python tools/check_parity.py --size vit_b [--size vit_l ...]

Prints the largest absolute differences of image embeddings, low-resolution mask logits and IoU scores for each prompt;
exits with 1 when masks or scores differ by more than 1e-4. ViT-H takes 7 GB of memory and three minutes on two cores.
tests/models/test_meta_parity.py runs the same comparison on ViT-B.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from torchvision_shim import import_segment_anything  # noqa: E402
from transformers import SamModel  # noqa: E402

from carsam.models.load import load_model  # noqa: E402

TOLERANCE = 1e-4
SIZES = ("vit_b", "vit_l", "vit_h")
IMAGE_SIZE = 1024

Outputs = dict[tuple[str, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Prompt:
    """One prompt of P objects; whatever is None is not given. Coordinates in pixels of the 1024 × 1024 input.

    Attributes:
        points: (P, N, 2), x before y.
        labels: (P, N); 1 inside, 0 outside.
        boxes: (P, 4), x1, y1, x2, y2.
        mask: (1, 1, 256, 256) logits.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    mask: Tensor | None = None


def prompts(seed: int = 1) -> dict[str, Prompt]:
    """The prompts that are compared: each kind alone, and together."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([[100.0, 200.0, 500.0, 640.0], [30.5, 17.25, 1000.0, 900.0]])
    points = torch.tensor(
        [[[350.0, 420.0], [120.0, 800.5], [700.0, 64.0]], [[10.0, 10.0], [512.0, 512.0], [3.0, 900.0]]]
    )
    labels = torch.tensor([[1, 0, 1], [0, 1, 1]])
    mask = torch.randn(1, 1, IMAGE_SIZE // 4, IMAGE_SIZE // 4, generator=generator) * 4
    return {
        "box": Prompt(boxes=boxes),
        "points": Prompt(points=points, labels=labels),
        "mask": Prompt(mask=mask),
        "points+box+mask": Prompt(points=points[:1], labels=labels[:1], boxes=boxes[:1], mask=mask),
    }


def sample_image(seed: int = 2) -> Tensor:
    """(1, 3, 1024, 1024) normalised pixels: smooth structure and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, 16, 16, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")
    return smooth + 0.3 * torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def reference_sam(size: str, seed: int = 0) -> nn.Module:
    """Meta's model as its package initialises it, changed where the check could not see a fault.

    Positions start at zero and norms at one: swapped or lost, they would change nothing. Random heads give logits ten
    times smaller than this model's, under which a tolerance of 1e-4 would hide what matters.

    Args:
        size: "vit_b", "vit_l" or "vit_h".
        seed: Seed of all weights.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        sam = import_segment_anything().sam_model_registry[size]()
        for name, parameter in sam.named_parameters():
            if name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):
                parameter.normal_(std=0.1)
        for module in sam.modules():
            if "Norm" in type(module).__name__:
                module.weight.add_(0.1 * torch.randn_like(module.weight))
                module.bias.add_(0.1 * torch.randn_like(module.bias))
        for head in (*sam.mask_decoder.output_hypernetworks_mlps, sam.mask_decoder.iou_prediction_head):
            head.layers[-1].weight.mul_(10)
    return sam.eval().requires_grad_(False)


@torch.no_grad()
def meta_outputs(sam: nn.Module, image: Tensor) -> tuple[Tensor, Outputs]:
    """Image embeddings, and (masks, scores) by (prompt, multimask), from Meta's model."""
    embeddings = sam.image_encoder(image)
    outputs = {}
    for name, prompt in prompts().items():
        points = None if prompt.points is None else (prompt.points, prompt.labels)
        sparse, dense = sam.prompt_encoder(points=points, boxes=prompt.boxes, masks=prompt.mask)
        for multimask in (True, False):
            outputs[name, multimask] = sam.mask_decoder(
                image_embeddings=embeddings,
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
            )
    return embeddings, outputs


@torch.no_grad()
def carsam_outputs(model: SamModel, image: Tensor) -> tuple[Tensor, Outputs]:
    """The same from transformers' model."""
    embeddings = model.get_image_embeddings(image)
    outputs = {}
    for name, prompt in prompts().items():
        for multimask in (True, False):
            result = model(
                image_embeddings=embeddings,
                input_points=None if prompt.points is None else prompt.points[None],
                input_labels=None if prompt.labels is None else prompt.labels[None],
                input_boxes=None if prompt.boxes is None else prompt.boxes[None],
                input_masks=prompt.mask,
                multimask_output=multimask,
            )
            outputs[name, multimask] = result.pred_masks[0], result.iou_scores[0]
    return embeddings, outputs


def difference(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape."""
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {tuple(first.shape)} and {tuple(second.shape)}")
    return (first - second).abs().max().item()


def check(size: str) -> bool:
    """Compares one size and prints a table; true when all masks and scores agree within ``TOLERANCE``."""
    start, image = time.perf_counter(), sample_image()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"sam_{size}.pth"
        sam = reference_sam(size)
        torch.save(sam.state_dict(), path)
        expected_embeddings, expected = meta_outputs(sam, image)
        # One model at a time: two of ViT-H and their activations would not fit everywhere.
        del sam
        gc.collect()
        model = load_model(path)
    embeddings, actual = carsam_outputs(model, image)
    print(f"{size}: image embeddings {difference(embeddings, expected_embeddings):.1e}")
    print(f"  {'prompt':<16} {'multimask':<10} {'masks':>9} {'scores':>9}   std of masks, of scores")
    worst = 0.0
    for (name, multimask), (masks, scores) in expected.items():
        mask_error, score_error = (difference(*pair) for pair in zip(actual[name, multimask], (masks, scores)))
        worst = max(worst, mask_error, score_error)
        spread = f"{masks.std():.2g}, {scores.std(correction=0):.2g}"
        print(f"  {name:<16} {multimask!s:<10} {mask_error:>9.1e} {score_error:>9.1e}   {spread}")
    agreed = worst <= TOLERANCE
    print(f"  {'agree' if agreed else 'DIFFER'}: largest {worst:.1e}; {time.perf_counter() - start:.0f} s", flush=True)
    return agreed


def main() -> int:
    """Command line entry; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=SIZES, help="repeat for several; default vit_b")
    results = [check(size) for size in parser.parse_args().size or ["vit_b"]]  # all of them, also after a failure
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
