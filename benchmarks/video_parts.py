"""What each part of a model that follows objects costs at 4 bits, and the parts that stay in floating point.

    python benchmarks/video_parts.py embedded/sam2-nano-256 --videos DAVIS_ROOT
    python benchmarks/video_parts.py embedded/sam2-nano-256 --videos DAVIS_ROOT --frames 20 --keep parts.json

Round to nearest with MSE ranges, calibrated once on clips made of the embedded images. Then one part after the other
computes in 4 bits alone; everything that carsam quantizes; everything but one part; and, on top of everything, each
part that carsam leaves in floating point. J&F over the objects of the videos, shown by their first mask. With
``--keep``, finished rows are kept in a file and not measured again.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import options
import torch
from torch import nn

import carsam
from carsam.bits.plan import BitPlan, Bits
from carsam.calibrate.observers import RangeRecorder
from carsam.evaluate.video import evaluate_videos
from carsam.methods.base import create
from carsam.models.attention import MatMulQuantizers
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.models.sites import OPERANDS, LayerSite, Sites
from carsam.prompts.calibration import CalibrationSet, calibration_set
from carsam.quantizers import QuantizedLayer, SiteQuantizer, simulate
from carsam.run.walk import fit_weights

IMAGES = Path(__file__).resolve().parents[1] / "embedded" / "images" / "calibration"
MATMULS = "MatMuls of"


def parts(sites: Sites) -> dict[str, Callable[[str], bool]]:
    """Parts by title: whether a site of that name belongs to it."""
    names = sites.family.names
    rotated = {site.name for site in sites.attentions if site.rotary}
    regions = list(dict.fromkeys(names.region(site.name) for site in sites.layers))

    operands = {site.operand(which) for site in sites.attentions for which in OPERANDS}

    def of(region: str, *, matmul: bool | None = None) -> Callable[[str], bool]:
        return lambda name: names.region(name) == region and (matmul is None or (name in operands) == matmul)

    found: dict[str, Callable[[str], bool]] = {region: of(region) for region in regions}
    for region in regions:
        if any(names.region(name) == region for name in rotated):
            found[f"{region}, {MATMULS} attentions (Q, K, V, P)"] = of(region, matmul=True)
            found[f"{region}, Linears"] = of(region, matmul=False)
    return found


def switch(model: nn.Module, sites: Sites, on: Callable[[str], bool]) -> None:
    """Leaves all sites in floating point but those that are ``on``; ranges stay as they were observed."""
    for site in sites.layers:
        layer = model.get_submodule(site.name)
        assert isinstance(layer, QuantizedLayer)
        if not on(site.name):
            layer.weight_bits = 16
        if not on(site.input):
            layer.input_quantizer.bits = 16
    for site in sites.attentions:
        matmul = model.get_submodule(site.name).matmul
        assert isinstance(matmul, MatMulQuantizers)
        for which in OPERANDS:
            if on(site.operand(which)):
                continue
            for quantizer in getattr(matmul, which).modules():
                if isinstance(quantizer, SiteQuantizer):
                    quantizer.bits = 16


def rows(sites: Sites, wider: Sites, extra: list[LayerSite]) -> Iterator[tuple[str, Callable[[str], bool]]]:
    """Titles with what is quantized.

    Args:
        sites: What carsam quantizes.
        wider: With the layers that stay in floating point.
        extra: Those of them that run at all.
    """
    kept = {name for site in sites.floating for name in (site.name, site.input)}
    own = parts(sites)
    yield "nothing (float)", lambda _name: False
    for title, holds in own.items():
        yield f"{title} alone", lambda name, holds=holds: name not in kept and holds(name)
    yield "**everything that carsam quantizes**", lambda name: name not in kept
    weights = {site.name for site in wider.layers}
    yield "everything, weights alone", lambda name: name not in kept and name in weights
    yield "everything, activations alone", lambda name: name not in kept and name not in weights
    for title, holds in own.items():
        if MATMULS not in title and "Linears" not in title:
            yield f"everything but {title}", lambda name, holds=holds: name not in kept and not holds(name)
    groups: dict[str, set[str]] = {}
    for site in extra:
        groups.setdefault(".".join(site.name.split(".")[:2]), set()).update((site.name, site.input))
    for title, names in groups.items():
        yield f"everything and `{title}`", lambda name, names=names: name not in kept or name in names


def observe(model: nn.Module, sites: Sites, data: CalibrationSet, observer: str) -> Callable[[LayerSite], bool]:
    """Sets ranges from the float model's clips; tells whether a layer ran at all (one for mask prompts does not)."""
    recorder = RangeRecorder([model])
    with recorder.recording(), simulate(weights=False, activations=False):
        for image in data.images:
            sites.family.forward(model, image)
    for quantizer, record in list(recorder.records.items()):
        if not record.seen:
            quantizer.bits = 16
            del recorder.records[quantizer]
    recorder.apply(observer)
    return lambda site: model.get_submodule(site.name).input_quantizer.bits < 16


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("model", help="what carsam quantize takes; a model that follows objects")
    parser.add_argument("--videos", type=Path, required=True, help="data set in DAVIS's or SA-V's form")
    parser.add_argument("--frames", type=int, help="only the first frames of every video")
    parser.add_argument("--limit", type=int, help="only the first videos")
    parser.add_argument("--images", type=int, default=12, help="calibration images, each moved for a clip")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--keep", type=Path, help="file of finished rows")
    arguments = options.parse(parser)
    model = carsam.load_model(arguments.model)
    sites = find_sites(model)
    # Layers that a memory adds to what stays in floating point, and those of the image model, as sites like any other.
    wider = replace(sites, layers=(*sites.layers, *sites.floating))
    method = create("rtn")
    images = calibration_set(model, IMAGES / "images", coco=IMAGES / "instances.json", n_images=arguments.images)
    data = sites.family.calibration_data(model, images)
    prepare_model(model, wider, BitPlan(Bits.parse(arguments.bits)), method.quantizer_for, method.softmax_for)
    model.requires_grad_(False)
    fit_weights(model, method.weight_observer)
    reached = observe(model, sites, data, method.activation_observer)
    extra = [site for site in sites.floating if reached(site)]

    kept = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.exists() else {}
    options.head("in 4 bits", "J&F", "J", "F")
    for title, on in rows(sites, wider, extra):
        if title not in kept:
            changed = copy.deepcopy(model)
            switch(changed, wider, on)
            with torch.no_grad(), simulate(weights=True, activations=True):
                found = evaluate_videos(changed, arguments.videos, limit=arguments.limit, frames=arguments.frames)
            kept[title] = [found.j_and_f, found.mean("j"), found.mean("f")]
            if arguments.keep:
                arguments.keep.write_text(json.dumps(kept))
        options.row(title, *(f"{value:.1f}" for value in kept[title]))


if __name__ == "__main__":
    main()
