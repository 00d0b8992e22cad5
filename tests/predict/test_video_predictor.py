"""The video predictor: transformers' own propagation, objects that leave and return, bounded memory, wrong input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from small_models import small_model
from transformers import Sam2VideoInferenceSession

import carsam
from carsam.errors import CheckpointError, DataError
from carsam.evaluate.video_measures import region_similarity
from carsam.predict.video import SamVideoPredictor

SIZE, FRAMES = (96, 128), 12


@pytest.fixture(scope="module")
def predictor():
    return SamVideoPredictor(small_model("sam2_video"))


@pytest.fixture(scope="module")
def clip():
    """Noise that moves, smooth enough to have structure after the resize."""
    generator = np.random.default_rng(1)
    base = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    base = np.array(Image.fromarray(base).resize(SIZE[::-1], Image.Resampling.BILINEAR))
    return [np.roll(base, (index, 2 * index), (0, 1)) for index in range(FRAMES)]


@pytest.fixture(scope="module")
def mask():
    inside = np.zeros(SIZE, bool)
    inside[20:60, 30:90] = True
    return inside


BOX = [30, 20, 90, 60]


def prompted(predictor, clip, kind, mask, number=1, frame=0, state=None):
    state = predictor.init_state(clip) if state is None else state
    if kind == "mask":
        return state, predictor.add_new_mask(state, frame, number, mask)
    if kind == "box":
        return state, predictor.add_new_points_or_box(state, frame, number, box=BOX)
    points = [[60, 40], [10, 10]]
    return state, predictor.add_new_points_or_box(state, frame, number, points=points, labels=[1, 0])


@pytest.mark.parametrize("kind", ["mask", "box", "points"])
def test_equal_to_transformers(predictor, clip, mask, kind):
    state, (frame, ids, first) = prompted(predictor, clip, kind, mask)
    assert (frame, ids, first.shape) == (0, [1], (1, 1, *SIZE))
    ours = [logits for _, _, logits in predictor.propagate_in_video(state)]
    assert torch.equal(ours[0], first)

    video = torch.cat([predictor.preprocessor(image)[0] for image in clip])
    session = Sam2VideoInferenceSession(video=video, video_height=SIZE[0], video_width=SIZE[1], dtype=torch.float32)
    index = session.obj_id_to_idx(1)
    scale = torch.tensor([128 / 128, 128 / 96])
    if kind == "mask":
        small = torch.nn.functional.interpolate(
            torch.tensor(mask)[None, None].float(), (128, 128), mode="bilinear", antialias=True
        )
        session.add_mask_inputs(index, 0, (small >= 0.5).float())
    else:
        points = [BOX[:2], BOX[2:]] if kind == "box" else [[60, 40], [10, 10]]
        labels = [2, 3] if kind == "box" else [1, 0]
        coords = torch.tensor(points)[None, None].float() * scale
        session.add_point_inputs(0, 0, {"point_coords": coords, "point_labels": torch.tensor([[labels]])})
    session.obj_with_new_inputs = [1]
    with torch.no_grad():
        predictor.model(inference_session=session, frame_idx=0)
    theirs = [out.pred_masks for out in predictor.model.propagate_in_video_iterator(session, start_frame_idx=0)]
    assert len(ours) == len(theirs) == FRAMES
    for mine, other in zip(ours, theirs):
        large = state.geometry.masks_to_original(other, 128)
        torch.testing.assert_close(mine, large, atol=1e-5, rtol=0)
    assert not torch.equal(ours[3], ours[4])  # the clip moves, and so does the answer


def test_objects_do_not_disturb_each_other(predictor, clip, mask):
    """Each has its own memory, wherever the other one was shown."""
    alone, _ = prompted(predictor, clip, "mask", mask)
    both, _ = prompted(predictor, clip, "mask", mask)
    prompted(predictor, clip, "box", mask, number="other", frame=4, state=both)
    of_one = [logits for _, _, logits in predictor.propagate_in_video(alone)]
    of_both = list(predictor.propagate_in_video(both))
    assert all(ids == [1, "other"] for _, ids, _ in of_both)
    for single, (_, _, pair) in zip(of_one, of_both):
        assert torch.equal(single[0], pair[0])


def test_directions_limits_and_reset(predictor, clip, mask):
    state, _ = prompted(predictor, clip, "mask", mask, frame=5)
    assert [frame for frame, _, _ in predictor.propagate_in_video(state)] == [*range(5, FRAMES)]
    backwards = predictor.propagate_in_video(state, reverse=True, max_frame_num_to_track=3)
    assert [frame for frame, _, _ in backwards] == [5, 4, 3, 2]
    assert [frame for frame, _, _ in predictor.propagate_in_video(state, 7, 1)] == [7, 8]
    predictor.reset_state(state)
    assert state.tracker.kept() == 0
    with pytest.raises(RuntimeError, match="no object has a prompt"):
        next(predictor.propagate_in_video(state))


def test_a_correction_stays(predictor, clip, mask):
    """A click on a tracked frame replaces the frame's mask, in this and every later pass."""
    state, _ = prompted(predictor, clip, "mask", mask)
    before = [logits for _, _, logits in predictor.propagate_in_video(state)]
    _, _, corrected = predictor.add_new_points_or_box(state, 6, 1, points=[[5, 5]], labels=[1])
    after = [logits for _, _, logits in predictor.propagate_in_video(state)]
    assert torch.equal(after[6], corrected) and not torch.equal(after[6], before[6])
    assert torch.equal(after[0], before[0]) and not torch.equal(after[8], before[8])


def test_points_are_replaced_or_added_to(predictor, clip):
    state = predictor.init_state(clip)
    _, _, both = predictor.add_new_points_or_box(state, 0, 1, points=[[60, 40], [10, 10]], labels=[1, 0])
    _, _, first = predictor.add_new_points_or_box(state, 0, 1, points=[[60, 40]], labels=[1])
    _, _, again = predictor.add_new_points_or_box(state, 0, 1, [[10, 10]], [0], clear_old_points=False)
    assert torch.equal(both, again) and not torch.equal(both, first)


def test_shares_of_the_size_are_pixels_without_normalising(predictor, clip):
    height, width = SIZE
    found = []
    for flag, scale in ((True, (1, 1)), (False, (width, height))):
        state = predictor.init_state(clip, offload_video_to_cpu=True)
        points, box = np.array([[60.0, 40.0]]) / scale, np.array(BOX, float) / (scale * 2)
        found.append(predictor.add_new_points_or_box(state, 0, 1, points, [1], normalize_coords=flag, box=box)[2])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)  # a coordinate may differ in its last digit


def test_memory_can_be_taken_over(predictor, clip, mask):
    """Prompted otherwise, but with the other's memory in its place, a tracker finds what the other one finds."""
    theirs, _ = prompted(predictor, clip, "mask", mask)
    ours, _ = prompted(predictor, clip, "mask", np.roll(mask, 20, 1))
    partly, _ = prompted(predictor, clip, "mask", np.roll(mask, 20, 1))
    ours.tracker.adopt(theirs.tracker, 0)
    partly.tracker.adopt(theirs.tracker, 0, ["pointers"])
    wanted, taken = (state.tracker.remembered(0, 0) for state in (theirs, partly))
    assert torch.equal(wanted["pointers"], taken["pointers"]) and not torch.equal(wanted["maps"], taken["maps"])
    found = [state.tracker.step(1)[0].logits for state in (theirs, ours, partly)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


class Endless:
    """A video whose frames are made when they are asked for; counts how often."""

    def __init__(self, clip, length):
        self.clip, self.length, self.read = clip, length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read += 1
        return self.clip[index % len(self.clip)]


@pytest.mark.parametrize("length", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_memory_is_bounded(predictor, clip, mask, length):
    video = Endless(clip, length)
    state, _ = prompted(predictor, video, "mask", mask)
    kept = [state.tracker.kept() for _ in predictor.track(state)]
    assert len(kept) == length
    # Pointers of the sixteen frames after the prompt and of the last sixteen; from there on not one number more.
    assert set(kept[32:]) == {kept[32]} and kept[32] >= max(kept) > kept[0]
    assert video.read <= length + 2


def test_an_object_that_leaves_gives_empty_masks_and_is_found_when_it_returns(repo_root, evaluation_folder):
    """On the trained model: a cut-out of an image moves out of another one, stays away, and comes back."""
    coco = json.loads((evaluation_folder / "instances.json").read_text())
    chosen = max((a for a in coco["annotations"] if not a["iscrowd"]), key=lambda a: (a["id"] == 564, a["area"]))
    image = next(i for i in coco["images"] if i["id"] == chosen["image_id"])
    names = sorted(entry["file_name"] for entry in coco["images"])
    x, y, width, height = map(int, chosen["bbox"])
    inside = mask_utils.decode(chosen["segmentation"]).astype(bool)[y : y + height, x : x + width]

    def read(name):
        return Image.open(evaluation_folder / "images" / name).convert("RGB")

    cut = read(image["file_name"]).crop((x, y, x + width, y + height)).resize((90, 78))
    cut, inside = np.array(cut), np.array(Image.fromarray(inside).resize((90, 78)))
    ground = np.array(read(names[7]).resize((256, 256)))
    frames, truths = [], []
    for left in [60, 110, 160, 210, 300, 300, 300, 300, 210, 160, 110, 60]:
        frame, truth = ground.copy(), np.zeros((256, 256), bool)
        seen = inside[:, : max(0, 256 - left)]
        truth[80:158, left : left + 90] = seen
        frame[truth] = cut[:, : seen.shape[1]][seen]
        frames.append(frame)
        truths.append(truth)
    predictor = SamVideoPredictor(carsam.load_model(repo_root / "embedded" / "sam2-nano-256"))
    state = predictor.init_state(frames)
    predictor.add_new_mask(state, 0, 1, truths[0])
    overlaps, scores, areas = [], [], []
    for frame, found in predictor.track(state):
        masks = (predictor.masks(state, found)[0, 0] > 0).numpy()
        overlaps.append(region_similarity(masks, truths[frame]))
        scores.append(found[0].score)
        areas.append(int(masks.sum()))
    assert min(overlaps[:3]) > 0.8
    assert areas[5:8] == [0, 0, 0] and max(scores[5:8]) < 0  # away
    assert min(overlaps[-3:]) > 0.8 and min(scores[-3:]) > 0  # back


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, s: p.add_new_mask(s, 0, 1, np.zeros(SIZE)), "no pixel"),
        (lambda p, s: p.add_new_mask(s, 0, 1, np.ones((5, 5))), r"must be \(96, 128\)"),
        (lambda p, s: p.add_new_mask(s, 12, 1, np.ones(SIZE)), "no frame 12; the video has frames 0 to 11"),
        (lambda p, s: p.add_new_points_or_box(s, 0, 1), "give points with labels, a box, or both"),
        (lambda p, s: p.add_new_points_or_box(s, 0, 1, points=[[1, 2]]), "belong together"),
        (lambda p, s: p.add_new_points_or_box(s, 0, 1, [[1, 2]], [1, 0]), "as many labels"),
        (lambda p, s: p.add_new_points_or_box(s, 0, 1, [[1, 2]], [2]), "labels must be 1"),
        (lambda p, s: p.add_new_points_or_box(s, 0, 1, [[np.nan, 2]], [1]), "NaN"),
        (lambda p, s: p.add_new_points_or_box(s, 0, 1, box=[9, 0, 1, 4]), "x1 ≤ x2"),
    ],
)
def test_wrong_prompts(predictor, clip, call, message):
    state = predictor.init_state(clip)
    with pytest.raises(ValueError, match=message):
        call(predictor, state)
    assert state.tracker.objects == ()


def test_a_box_after_points_needs_a_fresh_start(predictor, clip):
    state = predictor.init_state(clip)
    predictor.add_new_points_or_box(state, 0, 1, [[60, 40]], [1])
    with pytest.raises(ValueError, match="before points"):
        predictor.add_new_points_or_box(state, 0, 1, box=BOX, clear_old_points=False)


def test_videos_that_cannot_be_followed(predictor, clip, mask, nano):
    with pytest.raises(CheckpointError, match="SamModel segments images"):
        SamVideoPredictor(nano).init_state(clip)
    with pytest.raises(ValueError, match="at least one frame"):
        predictor.init_state([])
    state, _ = prompted(predictor, [*clip[:2], clip[2][:50]], "mask", mask)
    with pytest.raises(DataError, match="frame 2 has 128 × 50 pixels, the first 128 × 96"):
        list(predictor.propagate_in_video(state))
