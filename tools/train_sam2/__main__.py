"""Train `sam2-nano-256`, a small SAM 2 of transformers' own classes, from scratch on still images with instance masks.

The model is a `Sam2VideoModel` (`Sam2Model` loads it too): prompt encoder, mask decoder, memory encoder and object
pointers as in SAM 2.1, memory attention with half as wide an MLP, and a small Hiera as image encoder. Training first
takes single images, then clips that are made of stills: an image that moves and bends, with cut-out objects of other
images moving over it, so that objects are hidden, leave and come back. The forward pass over a clip is the computation
of `Sam2VideoModel` at inference (memory of seven frames, object pointers, binarised first mask, hard choice by the
object score), batched; `selftest` proves it against the model's own inference session.

    python -m tools.train_sam2 pack clips.npz DATA/train-mix DATA/coco-train100  # COCO-form folders into one file
    python -m tools.train_sam2 selftest                                          # clip forward = inference session
    python -m tools.train_sam2 train clips.npz OUT_DIR --minutes 9.1             # one GPU; a CPU only tries it out
    python -m tools.train_sam2 export OUT_DIR embedded/sam2-nano-256             # shards into a transformers folder
    python -m tools.train_sam2 images embedded/sam2-nano-256 DATA/coco-val50     # box prompts: mean IoU, segm AP
    python -m tools.train_sam2 video embedded/sam2-nano-256 DATA/davis16-a       # J, F, J&F from the first frame
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.train_sam2.clips import pack
from tools.train_sam2.measure import measure_images, measure_video
from tools.train_sam2.model import LOW, SIZE, build_config
from tools.train_sam2.proof import selftest
from tools.train_sam2.training import read_shards, train


def export(args: argparse.Namespace) -> None:
    """Write the shards as a folder of transformers: FP16 weights, configuration, processors (they need torchvision)."""
    from transformers import Sam2ImageProcessor, Sam2VideoModel, Sam2VideoProcessor, Sam2VideoVideoProcessor

    model = Sam2VideoModel(build_config())
    model.load_state_dict(read_shards(args.source), strict=True)
    model.half().save_pretrained(args.out)
    size = {"height": SIZE, "width": SIZE}
    image = Sam2ImageProcessor(size=size, mask_size={"height": LOW, "width": LOW})
    processor = Sam2VideoProcessor(image, Sam2VideoVideoProcessor(size=size), target_size=SIZE)
    processor.save_pretrained(args.out)
    image.save_pretrained(args.out)
    print(sorted((path.name, path.stat().st_size) for path in args.out.iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function, **paths) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=(function.__doc__ or name).splitlines()[0])
        for path, nargs in paths.items():
            sub.add_argument(path, type=Path, nargs=nargs)
        sub.set_defaults(function=function)
        return sub

    sub = command("pack", lambda a: pack(a.out, a.folders, a.size, a.quality), out=None, folders="+")
    sub.add_argument("--size", type=int, default=320, help="side of the stored squares, px")
    sub.add_argument("--quality", type=int, default=75, help="of WebP")
    sub = command("selftest", selftest)
    sub.add_argument("--weights", type=Path, help="a folder of shards instead of the random start")
    sub = command("train", train, data=None, out=None)
    sub.add_argument("--minutes", type=float, default=10.5, help="length of the whole schedule")
    sub.add_argument(
        "--stop-after", type=float, default=1e9, help="seconds of this call; the schedule goes on with --resume"
    )
    sub.add_argument("--resume", type=Path, help="a --state file, or a folder of shards; ignored if it is not there")
    sub.add_argument("--state", help="write the whole training state here as well")
    sub.add_argument("--image-share", type=float, default=0.45, help="share of the time for single images only")
    sub.add_argument("--batch", type=int, default=64, help="images a step")
    sub.add_argument("--prompts", type=int, default=12, help="objects an image")
    sub.add_argument("--clips", type=int, default=32, help="clips a step")
    sub.add_argument("--objects", type=int, default=2, help="objects a clip")
    sub.add_argument("--frames", type=int, default=8, help="frames a clip (half as many at first)")
    sub.add_argument("--lr", type=float, default=1e-3)
    sub.add_argument("--warmup", type=int, default=200, help="steps")
    sub.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights")
    sub.add_argument("--save-every", type=float, default=120, help="seconds")
    sub.add_argument("--log-every", type=int, default=50, help="steps")
    sub.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by time)")
    sub.add_argument("--limit", type=int, default=0, help="use only so many images")
    sub.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    sub.add_argument("--probe-clips", action="store_true", help="alternate both kinds of steps from the start")
    sub.add_argument("--seed", type=int, default=0)
    command("export", export, source=None, out=None)
    command("images", measure_images, model=None, data=None)
    sub = command("video", measure_video, model=None, data=None)
    sub.add_argument("--prompts", nargs="+", default=["mask", "box", "copy"], choices=["mask", "box", "copy"])
    sub.add_argument("--frames", type=int, default=0, help="only so many of each sequence (0: all)")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
