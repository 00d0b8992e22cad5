"""The pair of files that SAM 2's tools share (images), with what differs among them as settings."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from carsam.data.images.normalisation import IMAGENET
from carsam.export.assemble import Around, assemble
from carsam.export.graph import Stretch
from carsam.export.image import from_imagenet
from carsam.export.masks import stretched_to_original, to_side
from carsam.export.profile import Subject
from carsam.export.trace import Core

# Logits are cut here in samexporter's files.
LIMIT = 32.0


def is_pyramid(core: Core) -> bool:
    """Whether a model's decoder reads several maps of the image, as SAM 2's does, instead of one."""
    return len(core.names) > 1


def encoder(subject: Subject, core: Core, name: str, outputs: dict[str, str] | None = None) -> onnx.ModelProto:
    """Pixels (1, 3, S, S), stretched to the frame and normalised by ImageNet's constants, to the three maps.

    Args:
        subject: The model.
        core: Its graphs.
        name: Of the input.
        outputs: Names of the core's maps to their names in the file, in the file's order; the core's own otherwise.
    """
    shapes = dict(zip(core.names, core.shapes))
    outputs = outputs or {each: each for each in core.names}
    around = Around(
        {name: (1, 3, core.side, core.side)},
        {theirs: shapes[ours] for ours, theirs in outputs.items()},
        names={"pixel_values": name, **outputs},
    )
    if subject.normalisation != IMAGENET:
        around.names = outputs
        from_imagenet(around.before, name, subject.normalisation, "pixel_values")
    return assemble(core.encoder, around, subject.properties("encoder", core))


def samexporter_decoder(subject: Subject, core: Core) -> onnx.ModelProto:
    """samexporter's and X-AnyLabeling's: prompts in batches, three masks each, at low resolution; pads with a point."""
    shapes = dict(zip(core.names, core.shapes))
    side = core.low_res
    around = Around(
        {
            "image_embed": shapes["image_embed"],
            "high_res_feats_0": shapes["high_res_feats_0"],
            "high_res_feats_1": shapes["high_res_feats_1"],
            "point_coords": ("num_labels", "num_points", 2),
            "point_labels": ("num_labels", "num_points"),
            # Both tools make a mask for every prompt, and one of them a single flag for all.
            "mask_input": ("num_masks", 1, side, side),
            "has_mask_input": ("num_flags",),
        },
        {"masks": ("num_labels", 3, side, side), "iou_predictions": ("num_labels", 3)},
        names={"mask": "mask_input", "has_mask": "has_mask_input"},
    )
    pad_points(around.before, "point_coords", "point_labels")
    several = [around.after.constant("slice", [value], np.int64) for value in (1, 4, 1)]
    masks = around.after.node("Slice", "logits", *several)
    ends = [around.after.constant("limit", limit, np.float32) for limit in (-LIMIT, LIMIT)]
    around.after.node("Clip", masks, *ends, outputs=["masks"])
    around.after.node("Slice", "iou", *several, outputs=["iou_predictions"])
    return assemble(core.decoder, around, subject.properties("decoder", core))


def decoder(
    subject: Subject,
    core: Core,
    names: dict[str, str] | None = None,
    *,
    mask_side: int = 0,
    batch: bool = False,
    pad: bool = False,
    first: int = 0,
    size_type: int = TensorProto.FLOAT,
    outputs: tuple[str, str, str] = ("masks", "iou_predictions", "low_res_masks"),
) -> onnx.ModelProto:
    """Prompts to masks at the image's size, their IoU, and masks at low resolution.

    Args:
        subject: The model.
        core: Its graphs.
        names: Names of the core's maps to their names in the file, in the file's order; the core's own otherwise.
        mask_side: Side of mask inputs; 0 for the model's own.
        batch: Any number of prompts instead of one.
        pad: Append the point that is none, which the tool leaves out.
        first: Masks before it are left out: 1 for the three of different extent alone.
        size_type: ONNX type of ``orig_im_size``.
        outputs: Names of the outputs.
    """
    shapes = dict(zip(core.names, core.shapes))
    names = names or {each: each for each in core.names}
    side, count = mask_side or core.low_res, 4 - first
    prompts: int | str = "num_prompts" if batch else 1
    masks, iou, low_res = outputs
    around = Around(
        {
            **{theirs: shapes[ours] for ours, theirs in names.items()},
            "point_coords": (prompts, "num_points", 2),
            "point_labels": (prompts, "num_points"),
            "mask_input": ("num_masks" if batch else 1, 1, side, side),
            "has_mask_input": (1,),
            "orig_im_size": (2,),
        },
        {
            masks: (prompts, count, "height", "width"),
            iou: (prompts, count),
            low_res: (prompts, count, core.low_res, core.low_res),
        },
        types={"orig_im_size": size_type},
    )
    known = {**names, "has_mask": "has_mask_input"}
    if pad:
        pad_points(around.before, "point_coords", "point_labels")
    else:
        known |= {"points": "point_coords", "labels": "point_labels"}
    if side == core.low_res:
        known["mask"] = "mask_input"
    else:
        to_side(around.before, "mask_input", core.low_res, "mask")
    after = around.after
    several = [after.constant("slice", [value], np.int64) for value in (first, 4, 1)]
    after.node("Slice", "logits", *several, outputs=[low_res])
    after.node("Slice", "iou", *several, outputs=[iou])
    stretched_to_original(after, low_res, "orig_im_size", masks)
    around.names = known
    return assemble(core.decoder, around, subject.properties("decoder", core))


def pad_points(graph: Stretch, points: str, labels: str) -> None:
    """Appends a point that is none (label -1) to every prompt: ``points`` and ``labels`` of the core."""
    axis = graph.constant("axis", [1], np.int64)
    label = graph.node("Slice", labels, graph.constant("first", [0], np.int64), axis, axis)
    zero = graph.node("Mul", label, graph.constant("nothing", 0, np.float32))
    none = graph.node("Sub", zero, graph.constant("one", 1, np.float32))
    corner = graph.node("Unsqueeze", zero, graph.constant("last", [2], np.int64))
    graph.node("Concat", labels, none, axis=1, outputs=["labels"])
    graph.node("Concat", points, graph.node("Concat", corner, corner, axis=2), axis=1, outputs=["points"])
