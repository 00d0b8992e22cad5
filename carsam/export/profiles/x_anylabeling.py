"""X-AnyLabeling: load the yaml with "Load Custom Model"."""

from __future__ import annotations

from typing import ClassVar

import yaml

from carsam.export import segment_anything_2 as pyramid
from carsam.export.profile import FRAME, Files, Profile, Subject
from carsam.export.segment_anything import decoder, pixel_encoder
from carsam.export.trace import Core

# What its segment_anything models are configured with; its code keeps images in this frame.
WIDTH, HEIGHT = 1024, 682


class XAnyLabeling(Profile):
    """samexporter's pair with the description that the tool opens."""

    name: ClassVar[str] = "x-anylabeling"
    tool: ClassVar[str] = "X-AnyLabeling (Load Custom Model)"

    def files(self, subject: Subject, core: Core) -> Files:
        encoder, mask_decoder = f"{subject.name}.encoder.onnx", f"{subject.name}.decoder.onnx"
        several = pyramid.is_pyramid(core)
        described = {
            "type": "segment_anything_2" if several else "segment_anything",
            "name": subject.name,
            "provider": "carsam",
            "display_name": subject.title,
            "encoder_model_path": encoder,
            "decoder_model_path": mask_decoder,
        }
        if several:
            graphs = pyramid.encoder(subject, core, "image"), pyramid.samexporter_decoder(subject, core)
        else:
            described |= {"input_size": FRAME, "max_width": WIDTH, "max_height": HEIGHT}
            graphs = pixel_encoder(subject, core, FRAME), decoder(subject, core, frame=FRAME)
        return {
            encoder: graphs[0],
            mask_decoder: graphs[1],
            f"{subject.name}.yaml": yaml.safe_dump(described, sort_keys=False, allow_unicode=True),
        }
