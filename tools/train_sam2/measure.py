"""Scores by transformers' own model and session, apart from carsam's evaluation, which they check."""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tools.train_sam2.clips import MEAN, STD, boxes_of
from tools.train_sam2.model import SIZE


def to_pixels(picture: Image.Image) -> Tensor:
    """(3, 256, 256), normalised, as SAM 2's processors do: bilinear with antialiasing, to a square."""
    image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float()[None]
    image = F.interpolate(image, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)[0] / 255
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def measure_images(args: argparse.Namespace) -> None:
    """Ground-truth boxes as prompts: mean IoU over the objects, segm AP (score: predicted IoU)."""
    from pycocotools import mask as mask_utils
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from transformers import Sam2Model

    model = Sam2Model.from_pretrained(args.model, dtype=torch.float32).eval()
    coco = COCO(str(args.data / "instances.json"))
    results, overlaps, clicked = [], [], []
    for number, entry in coco.imgs.items():
        found = [a for a in coco.imgToAnns[number] if not a["iscrowd"]]
        if not found:
            continue
        height, width = entry["height"], entry["width"]
        pixels = to_pixels(Image.open(args.data / "images" / entry["file_name"]))[None]
        xywh = torch.tensor([a["bbox"] for a in found])
        boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        boxes = boxes * torch.tensor([SIZE / width, SIZE / height] * 2)
        truths = np.stack([coco.annToMask(a) for a in found]).astype(bool)
        with torch.no_grad():
            out = model(pixel_values=pixels, input_boxes=boxes[None], multimask_output=False)
            logits = F.interpolate(out.pred_masks[0], (height, width), mode="bilinear", align_corners=False)
            inside = []
            for truth in truths:  # the click: the inside point farthest from the border, in the model's pixels
                y, x = deepest(truth)
                inside.append([(x + 0.5) * SIZE / width - 0.5, (y + 0.5) * SIZE / height - 0.5])
            points = torch.tensor(inside)[None, :, None]
            click = model(pixel_values=pixels, input_points=points, input_labels=torch.ones(points.shape[:3]).int())
            best = click.pred_masks[0][torch.arange(len(found)), click.iou_scores[0].argmax(1)]
            best = F.interpolate(best[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0] > 0
        masks = (logits[:, 0] > 0).numpy()
        for annotation, truth, mask, other, score in zip(found, truths, masks, best.numpy(), out.iou_scores[0, :, 0]):
            overlaps.append((mask & truth).sum() / max((mask | truth).sum(), 1))
            clicked.append((other & truth).sum() / max((other | truth).sum(), 1))
            code = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
            results.append(
                {
                    "image_id": number,
                    "category_id": annotation["category_id"],
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                    "score": float(score),
                }
            )
    evaluation = COCOeval(coco, coco.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    print(f"objects {len(overlaps)}  box mIoU {np.mean(overlaps):.4f}  one-click mIoU {np.mean(clicked):.4f}")
    print(f"segm AP {evaluation.stats[0]:.4f}  AP50 {evaluation.stats[1]:.4f}")


def deepest(mask: np.ndarray) -> tuple[int, int]:
    """Row and column of the pixel of a mask that lies farthest from its border."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return int(row), int(column)


def boundary_f(found: np.ndarray, true: np.ndarray) -> float:
    """DAVIS's contour measure F: precision and recall of boundary pixels within 0.8 % of the image's diagonal."""
    from scipy.ndimage import binary_dilation

    def edge(mask: np.ndarray) -> np.ndarray:  # as davis2017's seg2bmap at full size
        east, south, both = mask.copy(), mask.copy(), mask.copy()
        east[:, :-1], south[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        out = (mask ^ east) | (mask ^ south) | (mask ^ both)
        out[-1], out[:, -1], out[-1, -1] = (mask ^ east)[-1], (mask ^ south)[:, -1], False
        return out

    radius = math.ceil(0.008 * np.linalg.norm(true.shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    ours, theirs = edge(found), edge(true)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (ours & binary_dilation(theirs, disk)).sum() / ours.sum()
    recall = (theirs & binary_dilation(ours, disk)).sum() / theirs.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def measure_video(args: argparse.Namespace) -> None:
    """Follow the object of every DAVIS sequence from its first frame; J and F without the first and the last frame."""
    from transformers import Sam2VideoModel
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    model = Sam2VideoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = []
    for folder in sorted((args.data / "JPEGImages").iterdir()):
        paths = sorted(folder.glob("*.jpg"))[: args.frames or None]
        truths = [np.array(Image.open(args.data / "Annotations" / folder.name / f"{p.stem}.png")) == 1 for p in paths]
        video = torch.stack([to_pixels(Image.open(path)) for path in paths])
        shape = truths[0].shape
        first = F.interpolate(
            torch.tensor(truths[0])[None, None].float(), (SIZE, SIZE), mode="bilinear", antialias=True
        )
        scores = {}
        for kind in args.prompts:
            session = Sam2VideoInferenceSession(
                video=video, video_height=shape[0], video_width=shape[1], dtype=torch.float32
            )
            index = session.obj_id_to_idx(1)
            if kind == "mask":
                session.add_mask_inputs(index, 0, (first >= 0.5).float())
            elif kind == "box":
                box = boxes_of(torch.tensor(truths[0])[None].to(torch.uint8))
                box = box * torch.tensor([SIZE / shape[1], SIZE / shape[0]] * 2)
                labels = torch.tensor([[[2, 3]]], dtype=torch.int32)
                session.add_point_inputs(index, 0, {"point_coords": box.view(1, 1, 2, 2), "point_labels": labels})
            if kind != "copy":
                session.obj_with_new_inputs = [1]
                model(inference_session=session, frame_idx=0)
                low = [out.pred_masks for out in model.propagate_in_video_iterator(session, start_frame_idx=0)]
                large = F.interpolate(torch.cat(low), shape, mode="bilinear", align_corners=False)[:, 0]
                found = list((large > 0).numpy())
            else:
                found = [truths[0]] * len(truths)
            inner = list(zip(found, truths, strict=True))[1:-1]
            j = [(a & b).sum() / max((a | b).sum(), 1) if (a | b).any() else 1.0 for a, b in inner]
            f = [boundary_f(a, b) for a, b in inner]
            scores[kind] = (float(np.mean(j)), float(np.mean(f)), float(np.mean(j[-8:])))
            start = (found[0] & truths[0]).sum() / (found[0] | truths[0]).sum()
            late = np.mean(j[-8:])
            print(
                f"{folder.name:20s} {kind:5s} J {np.mean(j):.3f} F {np.mean(f):.3f}",
                f"first frame {start:.3f} last eight {late:.3f}",
                flush=True,
            )
        rows.append(scores)
    for kind in args.prompts:
        j, f, late = np.mean([row[kind] for row in rows], axis=0)
        print(
            f"{kind:5s} J {100 * j:.1f}  F {100 * f:.1f}  J&F {50 * (j + f):.1f}  last eight frames J {100 * late:.1f}"
        )
