"""How the error of a quantized model grows as it follows an object: by frame, by module, and by what it remembers.

    python benchmarks/video_error.py embedded/sam2-nano-256 PACKED... --videos DAVIS_ROOT
    python benchmarks/video_error.py embedded/sam2-nano-256 PACKED --videos DAVIS_ROOT --limit 4 --frames 24

The float model and a packed one follow the same objects, shown by their first mask, frame by frame. Errors of a
stage's output are relative squared errors, Σ (quantized − float)² / Σ (float − mean)², over the videos. Four runs tell
where they come from: with the memory that the packed model wrote itself; with maps and pointers of the float model put
in its place after every frame; and with either of them. What a run with the float memory loses is made on the frame;
what the others lose more comes back from the memory.

Beside the stages: what a frame leaves in memory (maps and object pointers, their error and their largest value), the
inputs of memory attention's MatMuls (the relative error of their codes, the share of values that the grid clips, and
what the codes of a softmax output's row sum to; queries and keys are quantized after they are rotated), and the object
score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import options
import torch
from torch import Tensor, nn

import carsam
from carsam.data.video.dataset import find_videos
from carsam.evaluate.video import show_objects
from carsam.evaluate.video_measures import region_similarity
from carsam.models.family import find_sites
from carsam.models.sites import OPERANDS, AttentionSite
from carsam.models.tracking import MAPS, POINTERS
from carsam.pack.checkpoint import open_model
from carsam.predict.video import SamVideoPredictor
from carsam.quantizers import SiteQuantizer, SoftmaxQuantizer

OPERAND_TITLES = dict(zip(OPERANDS, ("Q", "K", "V", "P")))
RUNS = {
    "its own memory": (),
    "float maps": (MAPS,),
    "float pointers": (POINTERS,),
    "float memory": (MAPS, POINTERS),
}


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("model", help="the float model")
    parser.add_argument("packed", nargs="+", help="packed models made of it")
    parser.add_argument("--videos", type=Path, required=True, help="data set in DAVIS's or SA-V's form")
    parser.add_argument("--limit", type=int, help="only the first videos")
    parser.add_argument("--frames", type=int, default=32, help="only the first frames of every video")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments = options.parse(parser)
    floating = SamVideoPredictor(carsam.load_model(arguments.model))
    sites = find_sites(floating.model)
    watched = [*sites.encoder_stages[-1:], *sites.memory_stages, *sites.decoder_stages]
    data = find_videos(arguments.videos)
    ages = _ages(arguments.frames)
    title = sites.family.names.short
    rotated = [site for site in sites.attentions if site.rotary]
    options.head("model", "memory", "what", *(f"frames {a} to {b - 1}" for a, b in ages))
    for path in arguments.packed:
        quantized = SamVideoPredictor(open_model(path))
        for run in arguments.runs:
            errors = Errors(watched, rotated)
            for name in data.names[: arguments.limit]:
                errors.follow(floating, quantized, data.open(name, arguments.frames), RUNS[run])
            for what, shown in errors.rows(ages, title):
                options.row(Path(path).name, run, what, *shown)


def _ages(frames: int) -> list[tuple[int, int]]:
    """The first frame that is tracked, and then doublings: errors of memory grow early if they grow at all."""
    ends = [1, 2, 4, 8]
    while ends[-1] * 2 < frames:
        ends.append(ends[-1] * 2)
    ends = [end for end in ends if end < frames]
    return list(zip(ends, [*ends[1:], frames]))


class Errors:
    """Errors by stage and frame, summed over videos.

    Args:
        stages: Module paths whose outputs are compared.
        attentions: Whose MatMuls' inputs are looked at; those of one kind together, over the layers.
    """

    def __init__(self, stages: list[str], attentions: list[AttentionSite]):
        self.stages, self.attentions = stages, attentions
        self.sums: dict[tuple[str, int], np.ndarray] = {}
        self.values: dict[tuple[str, int], list[float]] = {}

    @torch.no_grad()
    def follow(
        self, floating: SamVideoPredictor, quantized: SamVideoPredictor, video, adopted: tuple[str, ...]
    ) -> None:
        """Follows one video's objects with both models in step."""
        states = [predictor.init_state(video.video) for predictor in (floating, quantized)]
        for predictor, state in zip((floating, quantized), states):
            show_objects(predictor, state, video, "mask")
        theirs, ours = (state.tracker for state in states)
        ours.adopt(theirs, 0, adopted)
        for frame in range(1, len(video.video)):
            with _outputs(floating.model, self.stages) as want:
                exact = theirs.step(frame)
            with _outputs(quantized.model, self.stages) as got, self._codes(quantized.model, frame):
                found = ours.step(frame)
            for number in found:
                written, meant = (tracker.remembered(number, frame) for tracker in (ours, theirs))
                for kind in written:
                    self._add(f"written {kind}", frame, written[kind], meant[kind])
                    self._note(f"written {kind}, largest value", frame, written[kind].abs().max().item())
                    self._note(
                        f"written {kind}, largest value of the float model", frame, meant[kind].abs().max().item()
                    )
            ours.adopt(theirs, frame, adopted)
            for stage in self.stages:
                for a, b in zip(got[stage], want[stage]):
                    self._add(stage, frame, a, b)
            for number, tracked in found.items():
                self._add("mask logits", frame, tracked.logits.clamp(-20, 20), exact[number].logits.clamp(-20, 20))
                self._note("object score, difference", frame, tracked.score - exact[number].score)
                other = (tracked.score > 0) != (exact[number].score > 0)
                self._note("object score on the other side of 0, %", frame, 100.0 * other)
            masks = quantized.masks(states[1], found), floating.masks(states[0], exact)
            truth = video.masks(frame)
            for index, followed in enumerate(video.objects):
                ours_mask, float_mask = ((each[index, 0] > 0).cpu().numpy() for each in masks)
                self._note("J of the float model", frame, 100 * region_similarity(float_mask, truth[followed.number]))
                self._note("J", frame, 100 * region_similarity(ours_mask, truth[followed.number]))
                self._note("overlap with the float mask", frame, 100 * region_similarity(ours_mask, float_mask))

    @contextmanager
    def _codes(self, model: nn.Module, frame: int) -> Iterator[None]:
        """While a block runs: how far the inputs of MatMuls are from their codes, and how many of them are clipped."""
        handles = []
        for site in self.attentions:
            matmul = model.get_submodule(site.name).matmul
            for which in OPERANDS:
                name = f"{site.name.rpartition('.')[2]}, {OPERAND_TITLES[which]}"
                handles.append(getattr(matmul, which).register_forward_hook(partial(self._code, name, frame)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _code(self, name: str, frame: int, quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        exact = inputs[0].softmax(-1) if isinstance(quantizer, SoftmaxQuantizer) else inputs[0]
        self._add(f"{name}: error of its codes", frame, output, exact)
        if isinstance(quantizer, SoftmaxQuantizer):
            self._note(f"{name}: sum of a row, %", frame, 100 * output.sum(-1).mean().item())
        elif isinstance(quantizer, SiteQuantizer):
            values, low, high = quantizer.position(exact, quantizer.scale)
            self._note(f"{name}: clipped, %", frame, 100 * ((values < low) | (values > high)).float().mean().item())

    def _add(self, what: str, frame: int, got: Tensor, want: Tensor) -> None:
        error = (got.float() - want.float()).square().sum().item()
        spread = (want.float() - want.float().mean()).square().sum().item()
        self.sums[what, frame] = self.sums.get((what, frame), np.zeros(2)) + np.array([error, spread])

    def _note(self, what: str, frame: int, value: float) -> None:
        self.values.setdefault((what, frame), []).append(value)

    def rows(self, ages: list[tuple[int, int]], title: Callable[[str], str]) -> Iterator[tuple[str, list[str]]]:
        """What was measured, with its value over the frames of every age."""
        for what in dict.fromkeys(name for name, _ in self.sums):
            sums = [sum(self.sums[what, f] for f in range(*age) if (what, f) in self.sums) for age in ages]
            yield title(what), [f"{error / spread:.3f}" for error, spread in sums]
        for what in dict.fromkeys(name for name, _ in self.values):
            lists = [[v for f in range(*age) for v in self.values.get((what, f), [])] for age in ages]
            yield what, [f"{np.mean(values):.1f}" for values in lists]


@contextmanager
def _outputs(model: nn.Module, stages: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The first tensor that each stage gives, call by call, while a block runs."""
    found: dict[str, list[Tensor]] = {stage: [] for stage in stages}

    def keep(stage: str, output: object) -> None:
        while not isinstance(output, Tensor):  # a pyramid's finest map, an attention's output
            output = output[0]
        found[stage].append(output)

    handles = [
        model.get_submodule(stage).register_forward_hook(lambda _m, _a, output, stage=stage: keep(stage, output))
        for stage in stages
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
