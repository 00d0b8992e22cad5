"""sam2's ``SAM2VideoPredictor`` over a transformers model, float or quantized: prompts on frames, masks of all frames.

The interface is sam2's: ``init_state``, ``add_new_points_or_box``, ``add_new_mask``, ``propagate_in_video``,
``reset_state``. Two things differ. Frames are read when their turn comes, and memory of frames that no later frame can
reach is dropped, so neither grows with the length of the video. And a click on a frame that was tracked already is
decoded with the memory there, but without the mask that the frame had.

An object that leaves the picture gives masks without a pixel; its score is negative there. When it comes back, memory
attention finds it from its prompt, which never leaves the memory, and from what the last frames still hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carsam.data.images.transforms import Geometry, Preprocessor
from carsam.data.video.frames import Video, open_video
from carsam.errors import DataError
from carsam.models.family import family_of
from carsam.models.tracking import Tracked, Tracker
from carsam.predict.predictor import require_image
from carsam.predict.segment_anything import as_sam_model
from carsam.prompts.clips import to_input


class _Frames:
    """A video in the model's input frame, read one at a time."""

    def __init__(self, video: Video | Sequence[np.ndarray], preprocessor: Preprocessor, device: torch.device):
        self._video, self._preprocessor, self._device = video, preprocessor, device
        self._last: tuple[int, Tensor] | None = None
        if not len(video):
            raise ValueError("a video must have at least one frame.")
        first = self._read(0)
        _, self.geometry = preprocessor(first)

    def __len__(self) -> int:
        return len(self._video)

    def __getitem__(self, index: int) -> Tensor:
        if self._last is None or self._last[0] != index:
            image = self._read(index)
            if image.shape[:2] != tuple(self.geometry.original_size):
                height, width = self.geometry.original_size
                raise DataError(
                    f"frame {index} has {image.shape[1]} × {image.shape[0]} pixels, the first {width} × {height}; all "
                    "frames of a video must have one size."
                )
            self._last = index, self._preprocessor(image)[0][0].to(self._device)
        return self._last[1]

    def _read(self, index: int) -> np.ndarray:
        image = self._video.frame(index) if isinstance(self._video, Video) else self._video[index]
        require_image(image)
        return image


@dataclass
class VideoState:
    """A video with its prompts and memory: what ``init_state`` gives and everything else takes.

    Attributes:
        tracker: The model's memory of this video.
        geometry: How a frame lies in the input frame.
        num_frames: Of the video.
        points: Points (x, y) in pixels of the input frame and labels, by object and frame.
        objects: Ids of the objects as the user gave them; the tracker knows them by their place here.
    """

    tracker: Tracker
    geometry: Geometry
    num_frames: int
    points: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    objects: list[Any] = field(default_factory=list)


class SamVideoPredictor:
    """Follows objects through videos.

    Args:
        model: A transformers model, float or packed, or the folder, file or Hub id of one.

    Raises:
        ValueError: The model is something else.
    """

    def __init__(self, model: nn.Module | str | Path) -> None:
        self.model = as_sam_model(model)
        self.preprocessor = Preprocessor.for_model(self.model)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    def init_state(
        self,
        video_path: str | Path | Video | Sequence[np.ndarray],
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
    ) -> VideoState:
        """Begins with a video.

        Args:
            video_path: A folder of frames, an opened video, or a sequence of ``(H, W, 3)`` uint8 arrays.
            offload_video_to_cpu, offload_state_to_cpu, async_loading_frames: What sam2's callers pass where a long
                video does not fit in memory. Nothing follows: no more than one frame and a bounded memory are kept.

        Raises:
            DataError: The folder's frames do not fit together; see :func:`carsam.data.video.frames.open_video`.
            CheckpointError: The model knows images only.
            ValueError: The sequence is empty, or holds something else.
        """
        video = open_video(video_path) if isinstance(video_path, (str, Path)) else video_path
        frames = _Frames(video, self.preprocessor, self.device)
        tracker = family_of(self.model).track(self.model, frames)
        return VideoState(tracker, frames.geometry, len(frames))

    def add_new_points_or_box(
        self,
        inference_state: VideoState,
        frame_idx: int,
        obj_id: Any,
        points: np.ndarray | Tensor | None = None,
        labels: np.ndarray | Tensor | None = None,
        clear_old_points: bool = True,
        normalize_coords: bool = True,
        box: np.ndarray | Tensor | None = None,
    ) -> tuple[int, list[Any], Tensor]:
        """Prompts an object with points, a box, or both on a frame.

        Args:
            inference_state: From :meth:`init_state`.
            frame_idx: Index of the frame.
            obj_id: Any name of the object.
            points: ``(N, 2)`` as (x, y) in pixels of the video.
            labels: ``(N,)``: 1 inside the object, 0 outside.
            clear_old_points: Replace earlier points of this object on this frame instead of adding to them.
            normalize_coords: Points and box are in pixels, as above; False for shares of width and height (0..1), as in
                sam2.
            box: ``(4,)`` XYXY in pixels of the video; with ``clear_old_points``, or where nothing was given before.

        Returns:
            The frame, ids of the objects prompted so far on it, and their mask logits ``(N, 1, H, W)``.

        Raises:
            ValueError: Shapes do not fit, numbers are not finite, or the frame does not exist.
        """
        state = inference_state
        frame_idx = _frame_index(frame_idx, state)
        if (points is None) != (labels is None):
            raise ValueError("points and labels belong together; give both or neither.")
        if points is None and box is None:
            raise ValueError("give points with labels, a box, or both.")
        coords = _numbers(points if points is not None else [], "points").reshape(-1, 2)
        codes = _numbers(labels if labels is not None else [], "labels").reshape(-1)
        if len(coords) != len(codes):
            raise ValueError(f"as many labels as points are needed, not {len(codes)} for {len(coords)}.")
        if not set(codes.tolist()) <= {0, 1}:
            raise ValueError("labels must be 1 (inside the object) or 0 (outside).")
        key = (self._number(state, obj_id), frame_idx)
        if box is not None:
            corners = _numbers(box, "box").reshape(-1)
            if corners.size != 4 or corners[2] < corners[0] or corners[3] < corners[1]:
                raise ValueError(f"a box must be 4 numbers x1, y1, x2, y2 with x1 ≤ x2 and y1 ≤ y2, not {box!r}.")
            if key in state.points and not clear_old_points:
                raise ValueError("a box must come before points on the same frame: give both at once, or start anew.")
            coords, codes = np.concatenate([corners.reshape(2, 2), coords]), np.concatenate([[2, 3], codes])
        if not normalize_coords:
            height, width = state.geometry.original_size
            coords = coords * [width, height]
        given = (
            torch.as_tensor(state.geometry.points_to_input(coords), dtype=torch.float32),
            torch.as_tensor(codes, dtype=torch.int32),
        )
        if key in state.points and not clear_old_points:
            given = tuple(torch.cat(pair) for pair in zip(state.points[key], given))
        if not len(given[0]):
            raise ValueError("no points are given; give at least one, or a box.")
        state.points[key] = given
        found = state.tracker.prompt_points(key[0], frame_idx, *given)
        return self._given(state, frame_idx, {key[0]: found})

    def add_new_mask(
        self, inference_state: VideoState, frame_idx: int, obj_id: Any, mask: np.ndarray | Tensor
    ) -> tuple[int, list[Any], Tensor]:
        """Prompts an object with a mask on a frame.

        Args:
            inference_state: From :meth:`init_state`.
            frame_idx: Index of the frame.
            obj_id: Any name of the object.
            mask: ``(H, W)`` in the video's size; above 0 is inside.

        Returns:
            As :meth:`add_new_points_or_box`.

        Raises:
            ValueError: The mask has another size or no pixel, or the frame does not exist.
        """
        state = inference_state
        frame_idx = _frame_index(frame_idx, state)
        inside = torch.as_tensor(np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask) > 0)
        height, width = state.geometry.original_size
        if tuple(inside.shape) != (height, width):
            raise ValueError(f"a mask must be ({height}, {width}) as the video, not {tuple(inside.shape)}.")
        if not inside.any():
            raise ValueError("the mask has no pixel: there is nothing to follow.")
        number = self._number(state, obj_id)
        state.points.pop((number, frame_idx), None)
        placed = to_input(inside, state.geometry, self.preprocessor.image_size)
        found = state.tracker.prompt_mask(number, frame_idx, placed)
        return self._given(state, frame_idx, {number: found})

    def propagate_in_video(
        self,
        inference_state: VideoState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[int, list[Any], Tensor]]:
        """Follows all objects from frame to frame.

        Args:
            inference_state: With at least one prompt.
            start_frame_idx: Where to begin; the earliest prompted frame if None.
            max_frame_num_to_track: How many frames after the first one; all if None.
            reverse: Go backwards.

        Yields:
            Index of the frame, ids of all objects, and their mask logits ``(N, 1, H, W)`` float32; above 0 is inside.

        Raises:
            RuntimeError: Nothing was prompted.
        """
        for frame, found in self.track(inference_state, start_frame_idx, max_frame_num_to_track, reverse):
            yield self._given(inference_state, frame, found)

    def track(
        self,
        state: VideoState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[int, dict[int, Tracked]]]:
        """As :meth:`propagate_in_video`, with what the tracker gives: low-resolution logits and scores by object."""
        first = state.tracker.first_prompt()
        if first is None:
            raise RuntimeError("no object has a prompt; call add_new_points_or_box or add_new_mask first.")
        start = first if start_frame_idx is None else _frame_index(start_frame_idx, state)
        count = state.num_frames if max_frame_num_to_track is None else max_frame_num_to_track
        if reverse:
            # sam2 has nothing to do backwards from the first frame
            order = range(start, max(start - count, 0) - 1, -1) if start > 0 else range(0)
        else:
            order = range(start, min(start + count, state.num_frames - 1) + 1)
        for frame in order:
            yield frame, state.tracker.step(frame, reverse=reverse)

    def reset_state(self, inference_state: VideoState) -> None:
        """Forgets all prompts and objects of a video."""
        inference_state.tracker.reset()
        inference_state.points.clear()
        inference_state.objects.clear()

    def masks(self, state: VideoState, found: dict[int, Tracked]) -> Tensor:
        """Mask logits ``(N, 1, H, W)`` float32 in the video's size of what the tracker gave."""
        low = torch.stack([tracked.logits for tracked in found.values()])
        return state.geometry.masks_to_original(low, self.preprocessor.image_size)

    def _given(self, state: VideoState, frame: int, found: dict[int, Tracked]) -> tuple[int, list[Any], Tensor]:
        return frame, [state.objects[number] for number in found], self.masks(state, found)

    def _number(self, state: VideoState, obj_id: Any) -> int:
        if obj_id not in state.objects:
            state.objects.append(obj_id)
        return state.objects.index(obj_id)


def _frame_index(frame: int, state: VideoState) -> int:
    if isinstance(frame, bool) or int(frame) != frame or not 0 <= frame < state.num_frames:
        raise ValueError(f"there is no frame {frame}; the video has frames 0 to {state.num_frames - 1}.")
    return int(frame)


def _numbers(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite numbers; give finite ones, in pixels of the video.")
    return array
