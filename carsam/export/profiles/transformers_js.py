"""transformers.js: ``SamModel.from_pretrained(folder, {dtype: "q4"})``."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto

from carsam.errors import ConfigError
from carsam.export.assemble import Around, assemble
from carsam.export.profile import Files, Profile, Subject
from carsam.export.segment_anything import EMBEDDINGS
from carsam.export.trace import Core

POSITIONS = "image_positional_embeddings"


class TransformersJs(Profile):
    """The two files of transformers' own ONNX export of ``SamModel``, beside its configurations.

    The suffix of a file is what transformers.js calls its ``dtype``: ``q4`` for up to 4 bits, ``q8`` (``_quantized``)
    above.
    """

    name: ClassVar[str] = "transformers.js"
    tool: ClassVar[str] = "transformers.js"

    def check(self, subject: Subject, names: tuple[str, ...], side: int) -> None:
        if not subject.onnx_files:
            raise ConfigError(
                f"transformers.js has no model for the family {subject.family}; export with --profile onnx and run the "
                "pair with onnxruntime-web."
            )

    def files(self, subject: Subject, core: Core) -> Files:
        suffix = "" if subject.bits >= 16 else "_q4" if subject.bits <= 4 else "_quantized"
        encoder, decoder = subject.onnx_files
        return {
            f"onnx/{encoder}{suffix}.onnx": self._encoder(subject, core),
            f"onnx/{decoder}{suffix}.onnx": self._decoder(subject, core),
            "config.json": json.dumps(subject.config, indent=2, ensure_ascii=False) + "\n",
            "preprocessor_config.json": json.dumps(subject.preprocessor, indent=2, ensure_ascii=False) + "\n",
        }

    def _encoder(self, subject: Subject, core: Core) -> onnx.ModelProto:
        """``pixel_values`` to the embeddings, and positions that the decoder is given back and does not read."""
        shape = (1, 3, core.side, core.side)
        around = Around(
            {"pixel_values": shape},
            {EMBEDDINGS: core.shapes[0], POSITIONS: core.shapes[0]},
            names={core.names[0]: EMBEDDINGS},
        )
        zero = around.after.constant("zero", 0, np.float32)
        around.after.node("Mul", EMBEDDINGS, zero, outputs=[POSITIONS])
        return assemble(core.encoder, around, subject.properties("encoder", core))

    def _decoder(self, subject: Subject, core: Core) -> onnx.ModelProto:
        """``input_points`` (1, B, N, 2) with ``input_labels`` (1, B, N) to ``pred_masks`` and ``iou_scores``."""
        around = Around(
            {
                "input_points": (1, "point_batch_size", "nb_points_per_image", 2),
                "input_labels": (1, "point_batch_size", "nb_points_per_image"),
                EMBEDDINGS: core.shapes[0],
                POSITIONS: core.shapes[0],
            },
            {
                "iou_scores": (1, "point_batch_size", 3),
                "pred_masks": (1, "point_batch_size", 3, core.low_res, core.low_res),
            },
            names={core.names[0]: EMBEDDINGS},
            types={"input_labels": TensorProto.INT64},
        )
        before, after = around.before, around.after

        def ints(graph, *values: int) -> str:
            return graph.constant("ints", list(values), np.int64)

        # transformers appends a point that is none.
        points = before.node("Squeeze", "input_points", ints(before, 0))
        labels = before.node("Cast", before.node("Squeeze", "input_labels", ints(before, 0)), to=TensorProto.FLOAT)
        one = before.node("Slice", labels, ints(before, 0), ints(before, 1), ints(before, 1))
        none = before.node(
            "Sub",
            before.node("Mul", one, before.constant("zero", 0, np.float32)),
            before.constant("one", 1, np.float32),
        )
        before.node("Concat", labels, none, axis=1, outputs=["labels"])
        pair = before.node(
            "Unsqueeze", before.node("Add", none, before.constant("one", 1, np.float32)), ints(before, 2)
        )
        pair = before.node("Concat", pair, pair, axis=2)
        before.node("Concat", points, pair, axis=1, outputs=["points"])
        side = core.low_res
        before.node("ConstantOfShape", ints(before, 1, 1, side, side), outputs=["mask"])
        before.node("ConstantOfShape", ints(before, 1), outputs=["has_mask"])
        for core_name, name in (("iou", "iou_scores"), ("logits", "pred_masks")):
            several = after.node("Slice", core_name, ints(after, 1), ints(after, 4), ints(after, 1))
            after.node("Unsqueeze", several, ints(after, 0), outputs=[name])
        return assemble(core.decoder, around, subject.properties("decoder", core))
