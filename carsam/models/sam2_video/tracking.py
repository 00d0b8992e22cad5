"""Following objects with a ``Sam2VideoModel``: transformers' inference session, with memory that stays bounded.

Every object has a session of its own, as in sam2's predictor since December 2024: prompts of one do not make another
one run, and each keeps its own memory. All share the features of the frame that is looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceCache, Sam2VideoInferenceSession

from carsam.models.tracking import MAPS, MEMORIES, POINTERS, Frames, Tracked, Tracker

_PROMPTED, _TRACKED = "cond_frame_outputs", "non_cond_frame_outputs"
_KINDS = {MAPS: ("maskmem_features", "maskmem_pos_enc"), POINTERS: ("object_pointer",)}


class _Lazy(Mapping[int, Tensor]):
    """Frames as transformers' session reads them: a mapping from index to tensor, which keeps none."""

    def __init__(self, frames: Frames, dtype: torch.dtype):
        self._frames, self._dtype = frames, dtype

    def __getitem__(self, index: int) -> Tensor:
        return self._frames[index].to(self._dtype)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._frames)))

    def __len__(self) -> int:
        return len(self._frames)


class Sam2Tracker(Tracker):
    """Follows objects with transformers' own model, whatever its layers are (float or quantized).

    Args:
        model: The model.
        frames: The video.
    """

    def __init__(self, model: Sam2VideoModel, frames: Frames):
        self._model, self._frames = model, frames
        # Memory attention reads the maps of frames fewer than num_maskmem steps away, and the object pointers of those
        # fewer than max_object_pointers_in_encoder away.
        self._reach = {
            **dict.fromkeys(("maskmem_features", "maskmem_pos_enc"), model.config.num_maskmem),
            **dict.fromkeys(("object_pointer", "object_score_logits"), model.config.max_object_pointers_in_encoder),
        }
        self.reset()

    @property
    def objects(self) -> tuple[int, ...]:
        return tuple(self._sessions)

    def prompt_points(self, number: int, frame: int, points: Tensor, labels: Tensor) -> Tracked:
        session = self._session(number)
        session.remove_mask_inputs(0, frame)
        coords = points.to(self._model.device, torch.float32)[None, None]
        codes = labels.to(self._model.device, torch.int32)[None, None]
        session.add_point_inputs(0, frame, {"point_coords": coords, "point_labels": codes})
        return self._prompted(number, frame)

    def prompt_mask(self, number: int, frame: int, mask: Tensor) -> Tracked:
        session = self._session(number)
        session.remove_point_inputs(0, frame)
        session.add_mask_inputs(0, frame, mask[None, None].to(torch.float32))
        return self._prompted(number, frame)

    def first_prompt(self) -> int | None:
        frames = [frame for session in self._sessions.values() for frame in _outputs(session, _PROMPTED)]
        return min(frames, default=None)

    def step(self, frame: int, *, reverse: bool = False) -> dict[int, Tracked]:
        found = {}
        for number, session in self._sessions.items():
            found[number] = self._run(session, frame, reverse=reverse)
            self._forget(session, frame)
        return found

    def reset(self) -> None:
        self._sessions: dict[int, Sam2VideoInferenceSession] = {}
        device = self._model.device
        self._cache = Sam2VideoInferenceCache(inference_device=device, inference_state_device=device)

    def adopt(self, other: Tracker, frame: int, what: Collection[str] = MEMORIES) -> None:
        assert isinstance(other, Sam2Tracker) and other.objects == self.objects
        for number, session in self._sessions.items():
            for kind in (_PROMPTED, _TRACKED):
                theirs = _outputs(other._sessions[number], kind).get(frame, {})
                mine = _outputs(session, kind).get(frame, {})
                mine.update({name: theirs[name] for each in what for name in _KINDS[each] if name in theirs})

    def remembered(self, number: int, frame: int) -> dict[str, Tensor]:
        session = self._sessions[number]
        output = {**_outputs(session, _TRACKED), **_outputs(session, _PROMPTED)}[frame]
        return {kind: output[names[0]] for kind, names in _KINDS.items()}

    def kept(self) -> int:
        features = self._cache._vision_features.values()
        tensors = [tensor for entry in features for tensors in entry.values() for tensor in tensors]
        for session in self._sessions.values():
            for kind in (_PROMPTED, _TRACKED):
                for output in _outputs(session, kind).values():
                    tensors += [value for value in output.values() if isinstance(value, Tensor)]
        return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors)

    def _session(self, number: int) -> Sam2VideoInferenceSession:
        if number not in self._sessions:
            size, model = self._model.config.image_size, self._model
            session = Sam2VideoInferenceSession(
                video_height=size,
                video_width=size,
                inference_device=model.device,
                inference_state_device=model.device,
                dtype=model.dtype,
            )
            session.processed_frames = _Lazy(self._frames, model.dtype)
            session.cache = self._cache
            session.obj_id_to_idx(number)
            self._sessions[number] = session
        return self._sessions[number]

    def _prompted(self, number: int, frame: int) -> Tracked:
        session = self._sessions[number]
        session.obj_with_new_inputs = [number]
        found = self._run(session, frame, reverse=False)
        if frame in _outputs(session, _TRACKED):
            # A correction of a frame that was tracked: from now on it counts as prompted, and is not tracked anew.
            _outputs(session, _PROMPTED)[frame] = _outputs(session, _TRACKED).pop(frame)
        return found

    @torch.no_grad()
    def _run(self, session: Sam2VideoInferenceSession, frame: int, *, reverse: bool) -> Tracked:
        out = self._model(inference_session=session, frame_idx=frame, reverse=reverse)
        for kind in (_PROMPTED, _TRACKED):
            if frame in _outputs(session, kind):
                _outputs(session, kind)[frame].pop("high_res_masks", None)
        return Tracked(out.pred_masks[0].float(), float(out.object_score_logits.flatten()[0]))

    def _forget(self, session: Sam2VideoInferenceSession, frame: int) -> None:
        """Drops what no later frame can read: masks of tracked frames, and everything of frames out of reach.

        Frames near a prompt stay: a pass backwards from there reads them.
        """
        tracked, prompts = _outputs(session, _TRACKED), [frame, *_outputs(session, _PROMPTED)]
        for index, output in list(tracked.items()):
            away = min(abs(index - other) for other in prompts)
            tracked[index] = {name: value for name, value in output.items() if away < self._reach.get(name, 0)}
            if not tracked[index]:
                del tracked[index]


def _outputs(session: Sam2VideoInferenceSession, kind: str) -> dict[int, dict[str, Tensor]]:
    """What a session keeps of frames, by index: of those with prompts, or of those that were tracked."""
    kept = session.output_dict_per_obj
    return kept[0][kind] if kept else {}
