"""The pair of files that segment-anything's tools share, with what differs among them as settings."""

from __future__ import annotations

import numpy as np
import onnx

from carsam.data.images.normalisation import IMAGENET
from carsam.export.assemble import Around, assemble
from carsam.export.image import from_imagenet, from_pixels
from carsam.export.masks import best_mask, to_original, to_side
from carsam.export.profile import MASK, Subject
from carsam.export.trace import Core

EMBEDDINGS = "image_embeddings"


def pixel_encoder(subject: Subject, core: Core, frame: int, name: str = "input_image") -> onnx.ModelProto:
    """RGB pixels (H, W, 3) on 0..255, already resized to the frame, to ``image_embeddings``."""
    around = Around({name: ("height", "width", 3)}, {EMBEDDINGS: core.shapes[0]}, names={core.names[0]: EMBEDDINGS})
    from_pixels(around.before, name, core.side, frame, subject.normalisation, "pixel_values")
    return assemble(core.encoder, around, subject.properties("encoder", core))


def normalised_encoder(subject: Subject, core: Core, name: str) -> onnx.ModelProto:
    """Pixels (1, 3, S, S) that the tool has normalised by ImageNet's constants and padded, to ``image_embeddings``."""
    shape = (1, 3, core.side, core.side)
    around = Around({name: shape}, {EMBEDDINGS: core.shapes[0]})
    if subject.normalisation == IMAGENET:
        around.names = {"pixel_values": name, core.names[0]: EMBEDDINGS}
    else:
        around.names = {core.names[0]: EMBEDDINGS}
        from_imagenet(around.before, name, subject.normalisation, "pixel_values")
    return assemble(core.encoder, around, subject.properties("encoder", core))


def decoder(
    subject: Subject, core: Core, *, frame: int, mask_side: int = MASK, single_mask: bool = True, batch: bool = False
) -> onnx.ModelProto:
    """``image_embeddings, point_coords, point_labels, mask_input, has_mask_input, orig_im_size`` to ``masks,
    iou_predictions, low_res_masks``.

    Args:
        subject: The model.
        core: Its graphs.
        frame: Side of the frame in which the tool gives coordinates.
        mask_side: Side of mask inputs and of ``low_res_masks``.
        single_mask: One mask a prompt, chosen as segment-anything does; all of them otherwise.
        batch: Any number of prompts instead of one.
    """
    prompts: int | str = "num_prompts" if batch else 1
    masks = 1 if single_mask else 4
    around = Around(
        {
            EMBEDDINGS: core.shapes[0],
            "point_coords": (prompts, "num_points", 2),
            "point_labels": (prompts, "num_points"),
            "mask_input": ("num_masks" if batch else 1, 1, mask_side, mask_side),
            "has_mask_input": (1,),
            "orig_im_size": (2,),
        },
        {
            "masks": (prompts, masks, "height", "width"),
            "iou_predictions": (prompts, masks),
            "low_res_masks": (prompts, masks, mask_side, mask_side),
        },
    )
    before, after = around.before, around.after
    names = {core.names[0]: EMBEDDINGS, "labels": "point_labels", "has_mask": "has_mask_input"}
    if frame == core.side:
        names["points"] = "point_coords"
    else:
        # Centres of pixels of one frame in the other: (p + ½) · side / frame − ½.
        factor = core.side / frame
        points = before.node("Mul", "point_coords", before.constant("factor", factor, np.float32))
        before.node("Add", points, before.constant("centre", (factor - 1) / 2, np.float32), outputs=["points"])
    if mask_side == core.low_res:
        names["mask"] = "mask_input"
    else:
        to_side(before, "mask_input", core.low_res, "mask")
    chosen, low_res = "logits", "low_res_masks"
    if single_mask:
        best_mask(after, "logits", "iou", "point_coords", ("one_mask", "iou_predictions"))
        chosen = "one_mask"
    else:
        names["iou"] = "iou_predictions"
    to_original(after, chosen, "orig_im_size", frame, "masks")
    if mask_side != core.low_res:
        to_side(after, chosen, mask_side, low_res)
    elif single_mask:
        after.node("Identity", chosen, outputs=[low_res])
    else:
        names["logits"] = low_res
        for node in after.nodes:
            for index, name in enumerate(node.input):
                if name == "logits":
                    node.input[index] = low_res
    around.names = names
    return assemble(core.decoder, around, subject.properties("decoder", core))
