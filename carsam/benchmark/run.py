"""One table in one run: every subject in a process of its own, timed in turn with the baseline.

A machine's memory does not hold them all at once, so they come in waves of a few; the baseline is timed in each of
them, and a subject is set against the baseline of its own wave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from carsam.benchmark.process import RemoteSession, SubjectError, SubjectProcess
from carsam.benchmark.subjects import Subject, Work, prepared
from carsam.models.family import family_of
from carsam.models.forward import run_in
from carsam.runtime.halves import Halves

Inputs = dict[str, np.ndarray]
Score = Callable[[PreTrainedModel], dict[str, float]]
Say = Callable[[str], None]


@dataclass
class Row:
    """One subject's numbers.

    Attributes:
        name: Of the subject.
        ours: Whether it is one of ours.
        versions: Of the packages that it runs on.
        failed: Why it could not be measured; empty otherwise.
        file_bytes: Of its files.
        peak_bytes: Of its process, timing alone.
        opened_seconds: Until it could run.
        encoder_ms, decoder_ms: Of every round; a decoder's is one prompt.
        baseline_encoder_ms, baseline_decoder_ms: Of the baseline in the same rounds.
        scores: What the caller scores it by.
    """

    name: str
    ours: bool = False
    versions: str = ""
    failed: str = ""
    file_bytes: int = 0
    peak_bytes: int = 0
    opened_seconds: float = 0.0
    encoder_ms: list[float] = field(default_factory=list)
    decoder_ms: list[float] = field(default_factory=list)
    baseline_encoder_ms: list[float] = field(default_factory=list)
    baseline_decoder_ms: list[float] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """How many times faster than the baseline the encoder is."""
        return median(self.baseline_encoder_ms) / median(self.encoder_ms) if self.encoder_ms else float("nan")

    @property
    def decoder_speed(self) -> float:
        """How many times faster than the baseline the decoder is."""
        return median(self.baseline_decoder_ms) / median(self.decoder_ms) if self.decoder_ms else float("nan")

    def against(self, other: Row) -> tuple[float, float, float] | None:
        """The encoder's time as a multiple of another row's, round by round: its quartiles, the median between them.

        None where the two were not timed in the same rounds.
        """
        if not self.encoder_ms or self.baseline_encoder_ms != other.baseline_encoder_ms:
            return None
        ratios = [mine / its for mine, its in zip(self.encoder_ms, other.encoder_ms)]
        low, middle, high = np.percentile(ratios, [25, 50, 75]).tolist()
        return low, middle, high

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the medians."""
        found = asdict(self)
        if self.encoder_ms:
            found |= {"encoder_median_ms": median(self.encoder_ms), "decoder_median_ms": median(self.decoder_ms)}
            found |= {"encoder_against_baseline": self.speed, "decoder_against_baseline": self.decoder_speed}
        return found


@dataclass
class _Open:
    """A subject that is running."""

    row: Row
    process: SubjectProcess
    image: Inputs

    def time(self, pixels: Inputs, prompts: Inputs, repeats: int) -> tuple[float, float]:
        """Milliseconds of the encoder, and of the decoder a prompt (the median of some)."""
        encoder, _ = self.process.run("encoder", pixels)
        decoder = [self.process.run("decoder", {**self.image, **prompts})[0] for _ in range(repeats)]
        return encoder, median(decoder)


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        rounds: Interleaved rounds of every wave, after one that warms up and is not counted.
        at_once: Subjects of a wave beside the baseline.
        prompts: Decoder passes a round.
    """

    rounds: int = 7
    at_once: int = 3
    prompts: int = 5


def measure(
    work: Work,
    rows: Sequence[Subject],
    pixels: np.ndarray,
    prompts: Inputs,
    plan: Plan,
    say: Say,
    score: Score | None = None,
    found: list[Row] | None = None,
) -> list[Row]:
    """Measures subjects; the first is the baseline.

    Args:
        work: What they are made from.
        rows: The subjects.
        pixels: The image to time, (1, 3, S, S).
        prompts: ``points``, ``labels``, ``mask`` and ``has_mask`` of the prompt to time.
        plan: How.
        say: Told a line when something is known.
        score: Scores a model whose halves run in a subject's process; None where weights are random.
        found: Where rows go as they come, so that an interruption leaves those that were measured.

    Raises:
        SubjectError: The baseline itself cannot be measured.
    """
    inputs = {"pixel_values": pixels}
    found = [] if found is None else found
    with ExitStack() as whole:
        baseline = _opened(rows[0], work, inputs, prompts, whole)
        found.append(baseline.row)
        _scored(baseline, work, score)
        say(f"{baseline.row.name}: ready")
        waiting = list(rows[1:])
        while waiting:
            with ExitStack() as wave:
                running: list[_Open] = []
                while waiting and len(running) < plan.at_once:
                    subject = waiting.pop(0)
                    try:
                        running.append(_opened(subject, work, inputs, prompts, wave))
                    except SubjectError as error:
                        found.append(Row(subject.name, subject.ours, failed=str(error)))
                        say(f"{subject.name}: {error}")
                        continue
                    found.append(running[-1].row)
                    say(f"{subject.name}: ready")
                _rounds(baseline, running, inputs, prompts, plan)
                for each in running:
                    _finished(each, work, score, say)
        if len(found) == 1:
            _rounds(baseline, [], inputs, prompts, plan)
        baseline.row.peak_bytes = baseline.process.peak_bytes() if score is None else baseline.row.peak_bytes
    return found


def _opened(subject: Subject, work: Work, pixels: Inputs, prompts: Inputs, stack: ExitStack) -> _Open:
    """Starts a subject and runs it twice: the first run compiles, and plans the memory that the second takes."""
    spec, size = prepared(subject, work)
    process = stack.enter_context(SubjectProcess(spec))
    row = Row(subject.name, subject.ours, subject.versions(), file_bytes=size, opened_seconds=process.seconds)
    for _ in range(2):
        _, image = process.run("encoder", pixels, keep=True)
        process.run("decoder", {**image, **prompts})
    row.peak_bytes = process.peak_bytes()
    return _Open(row, process, image)


def _rounds(baseline: _Open, running: list[_Open], pixels: Inputs, prompts: Inputs, plan: Plan) -> None:
    for number in range(plan.rounds + 1):
        encoder, decoder = baseline.time(pixels, prompts, plan.prompts)
        for each in (baseline, *running):
            times = (encoder, decoder) if each is baseline else each.time(pixels, prompts, plan.prompts)
            if not number:
                continue
            each.row.encoder_ms.append(times[0])
            each.row.decoder_ms.append(times[1])
            each.row.baseline_encoder_ms.append(encoder)
            each.row.baseline_decoder_ms.append(decoder)


def _finished(each: _Open, work: Work, score: Score | None, say: Say) -> None:
    each.row.peak_bytes = each.process.peak_bytes()
    _scored(each, work, score)
    say(f"{each.row.name}: encoder {median(each.row.encoder_ms):.0f} ms, {each.row.speed:.2f}×")


def _scored(each: _Open, work: Work, score: Score | None) -> None:
    """Scores a subject by having the float model's halves run in its process."""
    if score is None:
        return
    model = work.model
    shapes = {name: tensor.shape for name, tensor in each.image.items()}
    sessions = (
        RemoteSession(each.process, "encoder", tuple(shapes)),
        RemoteSession(each.process, "decoder", ("logits", "iou")),
    )
    family = family_of(model)
    side = family.low_res_size(model)
    run_in(model, Halves(*sessions, shapes, side, each.row.name, family.box_ends_in_no_point))
    try:
        each.row.scores = score(model)
    except SubjectError as error:
        each.row.failed = f"not scored: {error}"
    finally:
        run_in(model, None)
