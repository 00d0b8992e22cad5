"""Objects followed from their first mask or box through the videos of a data set: J, F and J&F (METHOD.md, 11)."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from carsam.data.video.dataset import DAVIS, AnnotatedVideo, VideoSet, find_videos
from carsam.data.video.masks import write_mask
from carsam.errors import CarsamError, DataError
from carsam.evaluate.journal import Journals, evaluation_parts
from carsam.evaluate.video_measures import Summary, contour_accuracy, region_similarity, summarise
from carsam.output.files import LEFTOVER, hidden
from carsam.predict.video import SamVideoPredictor, VideoState

PROMPTS = ("mask", "box")
RESULTS = "results.json"
# Called with the video's name, frames done in it, its frames, videos done, and videos in all.
Progress = Callable[[str, int, int, int, int], None]


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """One object's measures.

    Attributes:
        video: Name of its video.
        name: Of the object.
        j, f: Over its scored frames, as fractions of 1.
        frames: How many frames are scored.
    """

    video: str
    name: str
    j: Summary
    f: Summary
    frames: int

    @property
    def j_and_f(self) -> float:
        """Mean of both means."""
        return (self.j.mean + self.f.mean) / 2


@dataclass(frozen=True)
class VideoResult:
    """Scores over a data set of videos, in percent: means over objects, as DAVIS and SA-V take them.

    Attributes:
        form: ``davis`` or ``sa-v``.
        prompt: What shows the objects: ``mask`` or ``box`` of their first frame.
        objects: All objects.
        n_frames: Frames that were followed.
        seconds: Time of following and scoring, over all videos.
    """

    form: str
    prompt: str
    objects: tuple[ObjectScore, ...]
    n_frames: int
    seconds: float

    def mean(self, measure: str, what: str = "mean") -> float:
        """A measure over all objects, in percent.

        Args:
            measure: ``j`` or ``f``.
            what: ``mean``, ``recall`` or ``decay``.
        """
        return 100 * float(np.mean([getattr(getattr(each, measure), what) for each in self.objects]))

    @property
    def j_and_f(self) -> float:
        """J&F in percent."""
        return (self.mean("j") + self.mean("f")) / 2

    def to_dict(self) -> dict[str, Any]:
        """As ``results.json`` has it."""
        means = {f"{m}_{what}": self.mean(m, what) for m in ("j", "f") for what in ("mean", "recall", "decay")}
        return {
            "form": self.form,
            "prompt": self.prompt,
            "j_and_f": self.j_and_f,
            **means,
            "n_videos": len({each.video for each in self.objects}),
            "n_objects": len(self.objects),
            "n_frames": self.n_frames,
            "seconds": round(self.seconds, 2),
            "objects": [{**asdict(each), "j_and_f": each.j_and_f} for each in self.objects],
        }


@dataclass(frozen=True)
class _Scored:
    """One video's part of the result."""

    objects: tuple[ObjectScore, ...]
    n_frames: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"objects": [asdict(o) for o in self.objects], "n_frames": self.n_frames, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> _Scored:
        objects = [
            ObjectScore(o["video"], o["name"], Summary(**o["j"]), Summary(**o["f"]), o["frames"])
            for o in values["objects"]
        ]
        return cls(tuple(objects), values["n_frames"], values["seconds"])


def evaluate_videos(
    model: PreTrainedModel,
    root: str | Path,
    *,
    prompt: str = "mask",
    limit: int | None = None,
    frames: int | None = None,
    masks: ResultFolder | None = None,
    journals: Journals | None = None,
    progress: Progress | None = None,
) -> VideoResult:
    """Follows every object of a data set through its video and scores the masks.

    The first and the last frame with a mask count for nothing, as in DAVIS and SA-V. Where a data set has one mask file
    a frame (DAVIS), a pixel belongs to at most one object: the one with the highest logit.

    Args:
        model: Of a family that follows objects, float or packed.
        root: The data set; see :func:`carsam.data.video.dataset.find_videos`.
        prompt: ``mask`` or ``box`` of the first frame.
        limit: Only the first videos.
        frames: Only the first frames of every video.
        masks: Where the masks are written to.
        journals: Where finished videos are kept, for an evaluation that is interrupted.
        progress: Told how far it is.

    Raises:
        DataError: Frames or masks are missing or damaged, or a prompt is unknown. All videos are looked at before the
            first one is followed.
        CheckpointError: The model knows images only.
    """
    if prompt not in PROMPTS:
        raise DataError(f"unknown prompt {prompt!r}; objects are shown by their first {' or '.join(PROMPTS)}.")
    data = find_videos(root)
    names = data.names[:limit]
    predictor = SamVideoPredictor(model)
    total, first_masks = 0, {}
    for name in names:  # everything wrong with the files shows now, not after an hour
        video = data.open(name, frames)
        total += len(video.video)
        first_masks[name] = video.objects[0].masks[video.objects[0].start]
    journal = None
    if journals is not None:
        parts = evaluation_parts(model, "video", {}, **_settings(data, names, prompt, frames, masks is not None))
        journal = journals.open(parts, len(names))
    scored: list[_Scored] = []
    for index, name in enumerate(names):
        kept = journal.get(index, first_masks[name]) if journal is not None else None
        if kept is not None and (masks is None or masks.has(name)):
            scored.append(_Scored.from_dict(kept))
            continue
        video = data.open(name, frames)
        report = None if progress is None else partial(_report, progress, video, index, len(names))
        if masks is None:
            found = follow(predictor, video, prompt, report=report)
        else:
            with masks.video(name) as folder:
                found = follow(predictor, video, prompt, folder=folder, report=report)
        scored.append(found)
        if journal is not None:
            journal.add(index, first_masks[name], found.to_dict())
    objects = tuple(each for part in scored for each in part.objects)
    seconds = sum(part.seconds for part in scored)
    return VideoResult(data.form, prompt, objects, sum(part.n_frames for part in scored), seconds)


def _report(progress: Progress, video: AnnotatedVideo, index: int, n_videos: int, done: int) -> None:
    progress(video.name, done, len(video.video), index, n_videos)


def _settings(data: VideoSet, names: tuple[str, ...], prompt: str, frames: int | None, written: bool) -> dict[str, Any]:
    """What decides the numbers beside the model: names and sizes of all files, and how objects are shown."""
    files = []
    for name in names:
        for folder in (data.frames / name, data.masks / name):
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files += [(path.relative_to(data.root).as_posix(), path.stat().st_size) for path in paths]
    return {"names and sizes": files, "prompt": prompt, "frames": frames, "written": written}


def follow(
    predictor: SamVideoPredictor,
    video: AnnotatedVideo,
    prompt: str = "mask",
    *,
    folder: Path | None = None,
    report: Callable[[int], None] | None = None,
    watch: Callable[[int, dict[int, np.ndarray]], None] | None = None,
) -> _Scored:
    """Follows the objects of one video and scores them frame by frame; no more than one frame is in memory.

    Args:
        predictor: Of the model.
        video: With its objects.
        prompt: ``mask`` or ``box``.
        folder: Where the masks are written to: a file a frame, or a folder an object in SA-V's form.
        report: Called with the number of frames done.
        watch: Called with every frame's index and masks ``(h, w)`` bool by object number.
    """
    started = time.perf_counter()
    state = predictor.init_state(video.video)
    show_objects(predictor, state, video, prompt)
    order = [state.objects.index(followed.number) for followed in video.objects]
    values: dict[int, list[tuple[float, float]]] = {followed.number: [] for followed in video.objects}
    counting = {followed.number: frozenset(followed.scored) for followed in video.objects}
    for done, (frame, found) in enumerate(predictor.track(state), start=1):
        logits = predictor.masks(state, {number: found[number] for number in order})[:, 0]
        masks = _separate(logits, video)
        if folder is not None:
            _write(folder, video, frame, masks)
        if watch is not None:
            watch(frame, masks)
        if any(frame in frames for frames in counting.values()):
            for number, true in video.masks(frame).items():
                if frame in counting[number]:
                    pair = masks[number], true
                    values[number].append((region_similarity(*pair), contour_accuracy(*pair)))
        if report is not None:
            report(done)
    objects = []
    for followed in video.objects:
        j, f = zip(*values[followed.number])
        objects.append(ObjectScore(video.name, followed.name, summarise(j), summarise(f), len(j)))
    return _Scored(tuple(objects), len(video.video), time.perf_counter() - started)


def show_objects(predictor: SamVideoPredictor, state: VideoState, video: AnnotatedVideo, prompt: str) -> None:
    """Prompts all objects of a video with the masks, or the boxes around the masks, of their first frames."""
    for followed in video.objects:
        mask = video.masks(followed.start)[followed.number]
        if prompt == "mask":
            predictor.add_new_mask(state, followed.start, followed.number, mask)
        else:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])  # the pixels' outer borders
            predictor.add_new_points_or_box(state, followed.start, followed.number, box=box)


def _separate(logits: torch.Tensor, video: AnnotatedVideo) -> dict[int, np.ndarray]:
    """Masks (h, w) bool of logits (N, h, w); in DAVIS's form a pixel goes to the object with the highest one."""
    inside = logits > 0
    if video.form == DAVIS and len(logits) > 1:
        best = logits.argmax(0)
        inside &= torch.arange(len(logits), device=logits.device)[:, None, None] == best
    return {followed.number: mask for followed, mask in zip(video.objects, inside.cpu().numpy())}


def _write(folder: Path, video: AnnotatedVideo, frame: int, masks: dict[int, np.ndarray]) -> None:
    name = f"{video.video.names[frame]}.png"
    if video.form == DAVIS:
        numbers = np.zeros(video.video.size, np.uint8)
        for number, mask in masks.items():
            numbers[mask] = number
        write_mask(folder / name, numbers)
        return
    for followed in video.objects:
        (folder / followed.name).mkdir(exist_ok=True)
        write_mask(folder / followed.name / name, masks[followed.number].astype(np.uint8))


@dataclass
class ResultFolder:
    """A folder of masks that DAVIS's and SA-V's own tools read: ``VIDEO/00000.png``, or ``VIDEO/000/00000.png``.

    Every video's folder appears whole. Those that an interrupted evaluation left are used again.

    Attributes:
        path: The folder.
        overwrite: Replace the results of a finished evaluation.
    """

    path: Path
    overwrite: bool = False

    def check(self, data: VideoSet) -> None:
        """Refuses a place where results cannot go.

        Raises:
            CarsamError: It holds a finished evaluation without ``overwrite``, something else than results, or lies in
                the data set; or it cannot be written.
        """
        place = Path(os.path.realpath(self.path))
        root = Path(os.path.realpath(data.root))
        if place == root or place.is_relative_to(root) or root.is_relative_to(place):
            raise CarsamError(f"{self.path} is, holds or lies in the data set {data.root}; choose another folder.")
        if place.exists() and not place.is_dir():
            raise CarsamError(f"{self.path} is a file; give a folder for the masks.")
        if place.is_dir():
            names = sorted(entry.name for entry in place.iterdir() if not LEFTOVER.fullmatch(entry.name))
            if RESULTS in names and not self.overwrite:
                raise CarsamError(
                    f"{self.path} holds the results of a finished evaluation; choose another folder, or replace them "
                    "with --overwrite."
                )
            ours = {RESULTS, *data.names}
            if foreign := [name for name in names if name not in ours]:
                raise CarsamError(
                    f"{self.path} holds something else than results of {data.root}: {foreign[0]}. Choose another "
                    "folder."
                )
            if RESULTS in names:
                (place / RESULTS).unlink()
                for name in data.names:
                    shutil.rmtree(place / name, ignore_errors=True)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CarsamError(f"cannot write {self.path}: {error.strerror or error}.") from error

    def has(self, name: str) -> bool:
        """Whether a video's masks are there."""
        return (self.path / name).is_dir()

    @contextmanager
    def video(self, name: str) -> Iterator[Path]:
        """Yields a folder for a video's masks, which takes its place when the block ends without an error.

        Raises:
            CarsamError: The disk is full, or the place is not writable.
        """
        target = self.path / name
        temporary = hidden(target, f"{os.getpid()}.tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
        except OSError as error:
            raise CarsamError(f"cannot write the masks {target}: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
