"""Folders of frames and masks: DAVIS's form, SA-V's, and everything that can be wrong with them."""

import shutil

import numpy as np
import pytest
from PIL import Image

from carsam.data.video.dataset import find_videos
from carsam.data.video.frames import open_video
from carsam.data.video.masks import palette, read_mask, read_single_mask, write_mask
from carsam.errors import DataError

SIZE = (24, 32)


def frame(path, seed=0, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def numbers(*boxes, size=SIZE):
    mask = np.zeros(size, np.uint8)
    for number, (top, left) in enumerate(boxes, 1):
        mask[top : top + 6, left : left + 8] = number
    return mask


@pytest.fixture
def davis(tmp_path):
    """Two videos of five frames with two objects, in DAVIS's form."""
    for video in ("cat", "dog"):
        for index in range(5):
            frame(tmp_path / "JPEGImages/480p" / video / f"{index:05d}.jpg", index)
            path = tmp_path / "Annotations/480p" / video / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mask(path, numbers((index, 2), (12, 20)))
    return tmp_path


@pytest.fixture
def sav(tmp_path):
    """One video of thirteen frames, every fourth with a mask, two objects, in SA-V's form."""
    for index in range(13):
        frame(tmp_path / "JPEGImages_24fps/sav_1" / f"{index:05d}.jpg", index)
    for name, place in (("000", (1, 1)), ("003", (5, 9))):
        for index in range(0, 13, 4):
            path = tmp_path / "Annotations_6fps/sav_1" / name / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers(place) * 255).convert("1").save(path)
    return tmp_path


def masks_of(root, video="cat"):
    return root / "Annotations/480p" / video


def frames_of(root, video="cat"):
    return root / "JPEGImages/480p" / video


def test_davis(davis):
    found = find_videos(davis)
    assert (found.form, found.names) == ("davis", ("cat", "dog"))
    video = found.open("cat")
    assert (len(video.video), video.video.size) == (5, SIZE)
    assert [(o.number, o.name, o.start, o.scored) for o in video.objects] == [
        (1, "1", 0, (1, 2, 3)),
        (2, "2", 0, (1, 2, 3)),
    ]
    truth = video.masks(3)
    assert np.array_equal(truth[1], numbers((3, 2)) == 1) and truth[2].sum() == 48
    assert video.video.frame(2).shape == (*SIZE, 3)
    assert len(found.open("dog", limit=3).video) == 3


def test_davis_without_a_folder_of_the_resolution(davis):
    for kind in ("JPEGImages", "Annotations"):
        for video in ("cat", "dog"):
            shutil.move(davis / kind / "480p" / video, davis / kind / video)
        (davis / kind / "480p").rmdir()
    assert find_videos(davis).names == ("cat", "dog")


def test_sa_v(sav):
    found = find_videos(sav)
    assert (found.form, found.names) == ("sa-v", ("sav_1",))
    video = found.open("sav_1")
    assert [(o.number, o.name, o.start, o.scored) for o in video.objects] == [
        (0, "000", 0, (4, 8)),
        (1, "003", 0, (4, 8)),
    ]
    assert video.masks(8)[1].sum() == 48 and video.masks(7) == {}


def test_objects_are_those_of_the_first_mask(davis):
    """DAVIS follows what its first mask shows; what comes later has no prompt."""
    write_mask(masks_of(davis) / "00002.png", numbers((2, 2), (12, 20), (0, 14)))
    assert [o.number for o in find_videos(davis).open("cat").objects] == [1, 2]


def test_a_mask_that_is_empty_later_is_an_object_that_left(davis):
    write_mask(masks_of(davis) / "00002.png", numbers())
    video = find_videos(davis).open("cat")
    assert not video.masks(2)[1].any() and 2 in video.objects[0].scored


def rename(path, name):
    path.rename(path.with_name(name))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (frames_of(root) / "00002.jpg").unlink(), "has no frame 2: after 00001.jpg comes 00003.jpg"),
        (lambda root: (masks_of(root) / "00003.png").unlink(), "has no mask 3"),
        (lambda root: (frames_of(root) / "00004.jpg").unlink(), "00004.png has no frame of that name"),
        (lambda root: frame(frames_of(root) / "00003.jpg", size=(24, 30)), "30 × 24 pixels, but 00000.jpg has 32 × 24"),
        (lambda root: write_mask(masks_of(root) / "00000.png", numbers()), "00000.png is empty"),
        (lambda root: write_mask(masks_of(root) / "00000.png", numbers(size=(20, 32))), "32 × 20 pixels, its frame"),
        (lambda root: Image.new("RGB", (32, 24), "red").save(masks_of(root) / "00000.png"), "picture in colours"),
        (lambda root: (frames_of(root) / "00002.jpg").write_bytes(b"\xff\xd8\xff"), "cannot read the image"),
        (lambda root: (masks_of(root) / "00000.png").write_bytes(b"no"), "cannot read the image"),
        (lambda root: shutil.copy(frames_of(root) / "00001.jpg", frames_of(root) / "00001.png"), "same frame twice"),
        (lambda root: rename(frames_of(root) / "00001.jpg", "0.jpg"), "two files of one number|no frame"),
        (lambda root: shutil.rmtree(frames_of(root)), "no frames in"),
        (lambda root: [p.unlink() for p in masks_of(root).iterdir()], "holds no masks"),
        (lambda root: [p.unlink() for p in masks_of(root).iterdir() if p.stem > "00001"], "at least three are needed"),
        (lambda root: shutil.rmtree(root / "JPEGImages"), "has no folder JPEGImages"),
        (lambda root: (masks_of(root, "dog") / "000").mkdir(), "mixes two forms"),
    ],
)
def test_spoiled(davis, spoil, message):
    spoil(davis)
    with pytest.raises(DataError, match=message):
        find_videos(davis).open("cat")


def test_a_frame_cut_off_is_an_error_when_it_is_read(davis):
    path = frames_of(davis) / "00002.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    video = find_videos(davis).open("cat")
    with pytest.raises(DataError, match=r"00002\.jpg"):
        video.video.frame(2)


def test_a_frame_replaced_by_another_size_is_an_error_when_it_is_read(davis):
    video = open_video(frames_of(davis))
    frame(frames_of(davis) / "00001.jpg", size=(10, 10))
    with pytest.raises(DataError, match="10 × 10"):
        video.frame(1)


def test_sa_v_empty_first_mask_and_two_objects_in_one_file(sav):
    path = sav / "Annotations_6fps/sav_1/003/00000.png"
    Image.new("L", SIZE[::-1]).save(path)
    with pytest.raises(DataError, match=r"003/00000\.png is empty"):
        find_videos(sav).open("sav_1")
    write_mask(path, numbers((1, 1), (10, 10)))
    with pytest.raises(DataError, match="several objects"):
        find_videos(sav).open("sav_1")


def test_a_video_file_is_told_how_to_become_frames(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"0000ftypisom")
    with pytest.raises(DataError, match=r"ffmpeg -i clip\.mp4"):
        open_video(tmp_path / "clip.mp4")


def test_frames_are_sorted_by_number(tmp_path):
    for index in (9, 10, 11):
        frame(tmp_path / f"{index}.jpg", index)
    assert open_video(tmp_path).names == ("9", "10", "11")


@pytest.mark.parametrize(
    "values, mode, wanted",
    [
        ([[0, 1, 2]], "P", [[0, 1, 2]]),
        ([[0, 1, 255]], "P", [[0, 1, 0]]),  # void
        ([[0, 255, 255]], "P", [[0, 0, 0]]),
        ([[0, 255, 0]], "L", [[0, 1, 0]]),  # DAVIS 2016
        ([[0, 1, 3]], "L", [[0, 1, 3]]),  # a palette that was lost
        ([[0, 255, 0]], "1", [[0, 1, 0]]),
    ],
)
def test_masks_with_and_without_palette(tmp_path, values, mode, wanted):
    image = Image.fromarray(np.array(values, np.uint8))
    if mode == "P":
        image.putpalette(palette())
    image.convert(mode).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == wanted
    if max(map(max, wanted)) <= 1 and mode != "P":
        assert read_single_mask(tmp_path / "m.png").tolist() == (np.array(wanted) > 0).tolist()


def test_a_grey_photograph_is_no_mask(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match="no palette and 256 different grey values"):
        read_mask(tmp_path / "m.png")


def test_written_masks_come_back_with_their_colours(tmp_path):
    write_mask(tmp_path / "m.png", numbers((1, 1), (9, 9)))
    with Image.open(tmp_path / "m.png") as image:
        # PASCAL VOC's first colours, as DAVIS has them
        assert image.mode == "P" and image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert np.array_equal(read_mask(tmp_path / "m.png"), numbers((1, 1), (9, 9)))
    with pytest.raises(ValueError, match="1 to 254"):
        write_mask(tmp_path / "m.png", np.full((2, 2), 255))
