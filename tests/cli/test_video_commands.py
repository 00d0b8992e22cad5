"""``carsam evaluate --video`` and ``carsam predict --video``: scores, folders, interruption, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image
from small_models import small_model

import carsam.evaluate.video as evaluation
from carsam.data.video.masks import read_mask, write_mask
from carsam.evaluate.video_measures import contour_accuracy, region_similarity

SIZE = (48, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sam2"
    small_model("sam2_video").save_pretrained(folder)
    return folder


def picture(seed):
    base = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(base).resize(SIZE[::-1], Image.Resampling.BILINEAR)


def numbers(shift):
    mask = np.zeros(SIZE, np.uint8)
    mask[5:25, 4 + shift : 24 + shift] = 1
    mask[28:44, 30:56] = 2
    return mask


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    root = tmp_path_factory.mktemp("davis")
    for video in ("a", "b"):
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / video).mkdir(parents=True)
        for index in range(5):
            picture(ord(video)).save(root / "JPEGImages" / video / f"{index:05d}.jpg")
            write_mask(root / "Annotations" / video / f"{index:05d}.png", numbers(index))
    return root


@pytest.fixture(scope="module")
def sav(davis, tmp_path_factory):
    root = tmp_path_factory.mktemp("sav")
    (root / "JPEGImages_24fps").symlink_to(davis / "JPEGImages")
    for name, number in (("000", 1), ("001", 2)):
        for index in (0, 2, 4):
            path = root / "Annotations_6fps" / "a" / name / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((numbers(index) == number).astype(np.uint8)).save(path)
    return root


def test_davis(carsam_cli, model, davis, tmp_path):
    out, file = tmp_path / "results", tmp_path / "scores.json"
    result = carsam_cli("evaluate", model, "--video", davis, "--out", out, "--json", file)
    assert result.exit_code == 0, result.output
    scores = json.loads(file.read_text())
    assert (scores["n_videos"], scores["n_objects"], scores["n_frames"]) == (2, 4, 10)
    assert f" {scores['j_and_f']:.1f} " in result.stdout
    # What is scored is what the files say: all frames are there, the first and the last do not count.
    first = scores["objects"][0]
    pairs = [(read_mask(out / "a" / f"{i:05d}.png") == 1, numbers(i) == 1) for i in range(5)][1:-1]
    assert first["video"] == "a" and first["name"] == "1" and first["frames"] == 3
    assert first["j"]["mean"] == pytest.approx(np.mean([region_similarity(*pair) for pair in pairs]))
    assert first["f"]["mean"] == pytest.approx(np.mean([contour_accuracy(*pair) for pair in pairs]))
    assert scores["j_mean"] == pytest.approx(100 * np.mean([each["j"]["mean"] for each in scores["objects"]]))
    written = json.loads((out / "results.json").read_text())
    assert written["j_and_f"] == scores["j_and_f"] and str(davis) not in json.dumps(written)
    with Image.open(out / "b" / "00004.png") as image:
        assert (image.mode, image.size) == ("P", SIZE[::-1])
    # the prompt's own frame gives back the mask; a pixel has one object
    assert region_similarity(read_mask(out / "a" / "00000.png") == 2, numbers(0) == 2) > 0.7


def test_sa_v(carsam_cli, model, sav, tmp_path):
    out = tmp_path / "results"
    result = carsam_cli("evaluate", model, "--video", sav, "--out", out, "--json", "-", "--prompt", "box")
    scores = json.loads(result.stdout)
    assert (scores["form"], scores["prompt"], scores["n_objects"]) == ("sa-v", "box", 2)
    assert {each["frames"] for each in scores["objects"]} == {1}
    assert sorted(p.name for p in (out / "a" / "001").iterdir()) == [f"{index:05d}.png" for index in range(5)]


def test_float_beside(carsam_cli, model, davis):
    result = carsam_cli(
        "evaluate", model, "--video", davis, "--float", model, "--json", "-", "--limit", 1, "--frames", 4
    )
    scores = json.loads(result.stdout)
    assert scores["float"]["j_and_f"] == scores["j_and_f"] and scores["n_frames"] == 4


def test_interrupted_and_gone_on_with(carsam_cli, model, davis, tmp_path, monkeypatch):
    whole = json.loads(carsam_cli("evaluate", model, "--video", davis, "--json", "-").stdout)
    follow, seen = evaluation.follow, []

    def once(predictor, video, *args, **kwargs):
        seen.append(video.name)
        if video.name == "b":
            raise KeyboardInterrupt
        return follow(predictor, video, *args, **kwargs)

    command = ["evaluate", model, "--video", davis, "--out", tmp_path / "out", "--json", "-"]
    monkeypatch.setattr(evaluation, "follow", once)
    result = carsam_cli(*command)
    assert result.exit_code == 130 and "1 of 2 videos are kept" in result.stderr
    assert not (tmp_path / "out" / "b").exists() and not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(
        evaluation, "follow", lambda p, video, *a, **k: seen.append(video.name) or follow(p, video, *a, **k)
    )
    again = json.loads(carsam_cli(*command).stdout)
    assert seen == ["a", "b", "b"]  # the first video is not followed twice
    assert [each["j"] for each in again["objects"]] == [each["j"] for each in whole["objects"]]
    refused = carsam_cli(*command)
    assert refused.exit_code == 1 and "results of a finished evaluation" in refused.stderr
    assert carsam_cli(*command, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--video", "{davis}", "--coco", "x.json"], "leave out --coco"),
        (["--frames", 4], "need --video"),
        ([], "give --coco and --images"),
        (["--video", "{davis}", "--prompt", "click"], "unknown prompt 'click'"),
        (["--video", "{davis}", "--out", "{davis}/Annotations"], "lies in the data set"),
        (["--video", "{davis}", "--out", "{davis}/.."], "holds or lies"),
        (["--video", "{davis}/nothing"], "there is no folder"),
        (["--video", "{davis}", "--float", "scores.json"], "scores in a file are of images"),
    ],
)
def test_refused(carsam_cli, model, davis, flags, message):
    result = carsam_cli("evaluate", model, *(str(flag).format(davis=davis) for flag in flags))
    assert result.exit_code == 1 and message in " ".join(result.stderr.split()), result.output


def test_a_model_of_images_cannot_follow(carsam_cli, nano_folder, davis):
    result = carsam_cli("evaluate", nano_folder, "--video", davis)
    assert result.exit_code == 1 and "has no memory to follow objects with" in " ".join(result.stderr.split())


def test_predict(carsam_cli, model, davis, tmp_path):
    frames, out = davis / "JPEGImages" / "a", tmp_path / "out"
    command = ["predict", model, "--video", frames, "--box", "4,5,24,25", "--box", "30,28,56,44", "--out", out]
    result = carsam_cli(*command, "--format", "png,overlay", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert [each["object"] for each in report["objects"]] == [1, 2]
    masks = [read_mask(out / f"{index:05d}.png", SIZE) for index in range(5)]
    for each in report["objects"]:
        assert each["frames"] == sum((mask == each["object"]).any() for mask in masks) == 5 - each["frames_without"]
    drawn = np.array(Image.open(out / "overlay" / "00002.png")).astype(int)
    plain = np.array(Image.open(frames / "00002.jpg")).astype(int)
    changed = (np.abs(drawn - plain).max(-1) > 2) & (masks[2] > 0)
    assert np.array_equal(drawn[masks[2] == 0], plain[masks[2] == 0])
    assert not (masks[2] > 0).any() or changed.mean() > 0
    assert "exists already" in carsam_cli(*command).stderr


def test_predict_from_a_mask(carsam_cli, model, davis, tmp_path):
    write_mask(tmp_path / "first.png", numbers(0))
    frames = davis / "JPEGImages" / "a"
    result = carsam_cli(
        "predict", model, "--video", frames, "--mask", tmp_path / "first.png", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert region_similarity(read_mask(tmp_path / "out" / "00000.png") > 0, numbers(0) > 0) > 0.7


def test_a_link_that_leads_nowhere_is_refused_before_anything_runs(carsam_cli, davis, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    command = ["predict", "no-model", "--video", davis / "JPEGImages" / "a", "--box", "4,5,24,25"]
    result = carsam_cli(*command, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "is a link to a folder that is not there" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--video", "{a}"], "show the objects on the first frame"),
        (["--video", "{a}", "--box", "1,1,5,5", "--mask", "m.png"], "show the objects on the first frame"),
        (["--video", "{a}", "--box", "100,1,105,5"], "has no area inside the image"),
        (["--video", "{a}", "--point", "65,1"], "lies outside the image"),
        (["--video", "{a}", "--box", "0.1,0.2,0.4,0.6"], "is on 0..1, but prompts are in pixels"),
        (["--video", "{a}", *("--box", "1,1,5,5") * 255], "the numbers of 254 objects at most, not of 255"),
        (["--video", "{a}", "--box", "1,1,5,5", "--out", "{a}"], "holds the frames"),
        (["--video", "{a}", "--everything"], "leave out --everything"),
        (["--video", "{a}", "--box", "1,1,5,5", "--format", "coco"], "writes png and overlay, not coco"),
        (["--video", "movie.mp4", "--box", "1,1,5,5"], "there is no image folder|ffmpeg"),
        (["--mask", "m.png"], "with --video"),
        ([], "give images to segment"),
    ],
)
def test_predict_refused(carsam_cli, model, davis, flags, message, tmp_path):
    flags = [flag.format(a=davis / "JPEGImages" / "a") for flag in flags]
    place = [] if "--out" in flags else ["--out", tmp_path]
    result = carsam_cli("predict", model, *flags, *place)
    assert result.exit_code == 1
    assert any(part in " ".join(result.stderr.split()) for part in message.split("|")), result.output
