"""``carsam predict``: inputs, prompts and outputs."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

import carsam
from carsam.data.coco.instances import CocoInstances
from carsam.data.images.reading import read_image

BOX = ("--box", "10,8,70,50")
LOW = ("--everything", "--points-per-side", "4", "--pred-iou-thresh", "0.1", "--stability-score-thresh", "0.1")


@pytest.fixture
def run(carsam_cli, nano_folder, tmp_path):
    """Runs ``predict`` with the embedded model into ``out``."""

    def predict(*arguments, out=tmp_path / "out", fails=None):
        result = carsam_cli("predict", nano_folder, *arguments, "--out", out, "--device", "cpu")
        assert result.exit_code == (1 if fails else 0), result.output
        assert (fails or "") in " ".join(result.stderr.split())
        return result

    return predict


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_mask(path):
    with Image.open(path) as image:
        assert image.mode == "L"
        values = np.array(image)
    assert set(np.unique(values)) <= {0, 255}
    return values > 0


@pytest.fixture(scope="module")
def predictor(nano):
    return carsam.SamPredictor(nano)


def test_every_format_holds_the_masks_of_the_predictor(run, photos, predictor, tmp_path):
    run(photos / "a.png", *BOX, "--box", "30,20,96,64", "--format", "png,overlay", "--format", "npz,coco")
    out = tmp_path / "out"
    expected_names = ["a.npz", "a_mask_1.png", "a_mask_2.png", "a_overlay.png", "predictions.json"]
    assert names(out) == expected_names
    predictor.set_image(read_image(photos / "a.png"))
    found = [predictor.predict(box=box, multimask_output=False) for box in ([10, 8, 70, 50], [30, 20, 96, 64])]
    masks = np.concatenate([masks for masks, _, _ in found])
    iou = np.concatenate([iou for _, iou, _ in found])
    for index, mask in enumerate(masks, 1):
        assert np.array_equal(read_mask(out / f"a_mask_{index}.png"), mask)
    with np.load(out / "a.npz") as arrays:
        assert np.array_equal(arrays["masks"], masks) and np.allclose(arrays["predicted_iou"], iou)
        assert arrays["number"].tolist() == [1, 2] and arrays["boxes"].shape == (2, 4)
    coco = CocoInstances.from_file(out / "predictions.json")
    assert np.array_equal(coco.masks(1), masks)
    raw = json.loads((out / "predictions.json").read_text())
    assert [a["score"] for a in raw["annotations"]] == pytest.approx(iou.tolist())
    assert [a["area"] for a in raw["annotations"]] == masks.sum((1, 2)).tolist()
    assert raw["categories"] == [{"id": 1, "name": "object"}]
    assert Image.open(out / "a_overlay.png").size == (96, 64)


def test_polygons_are_the_masks(run, photos, tmp_path):
    run(photos / "a.png", *BOX, "--format", "coco,png", "--polygons")
    raw = json.loads((tmp_path / "out" / "predictions.json").read_text())
    polygons = raw["annotations"][0]["segmentation"]
    drawn = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, 64, 96))).astype(bool)
    mask = read_mask(tmp_path / "out" / "a_mask_1.png")
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.99


def test_the_overlay_shows_prompts(run, photos, tmp_path):
    run(photos / "a.png", *BOX, "--point", "40,30", "--point", "80,10,0")
    with Image.open(tmp_path / "out" / "a_overlay.png") as picture:
        pixels = np.array(picture.convert("RGB")).astype(int)
    red, green, _ = np.moveaxis(pixels[28:33, 37:44], -1, 0)
    assert (green - red > 100).any()  # inside: green
    red, green, _ = np.moveaxis(pixels[8:13, 77:84], -1, 0)
    assert (red - green > 100).any()  # outside: red
    dashes = pixels[8, 10:70]
    assert (np.abs(dashes - (255, 64, 64)).sum(1) < 60).any()


def test_multimask(run, photos, predictor, tmp_path):
    result = run(photos / "a.png", "--point", "40,30", "--multimask", "--json", "-")
    record = json.loads(result.stdout)
    predictor.set_image(read_image(photos / "a.png"))
    masks, iou, _ = predictor.predict(np.array([[40, 30]]), np.array([1]))
    for index, mask in enumerate(masks, 1):
        assert np.array_equal(read_mask(tmp_path / "out" / f"a_mask_1_{index}.png"), mask)
    described = record["images"][0]["masks"]
    assert [mask["choice"] for mask in described] == [1, 2, 3]
    assert [mask["predicted_iou"] for mask in described] == pytest.approx(iou.tolist())
    assert [mask["area"] for mask in described] == masks.sum((1, 2)).tolist()
    # Without the flag, a single point gets the best of the three.
    run(photos / "a.png", "--point", "40,30", out=tmp_path / "one")
    assert np.array_equal(read_mask(tmp_path / "one" / "a_mask_1.png"), masks[iou.argmax()])


def test_a_folder_with_names_that_differ_in_the_suffix(run, photos, tmp_path):
    result = run(photos, *BOX)
    stems = ["a.jpg", "a.png", "b"]
    assert names(tmp_path / "out") == sorted(f"{s}_{end}.png" for s in stems for end in ("mask_1", "overlay"))
    assert not np.array_equal(*(read_mask(tmp_path / "out" / f"{s}_mask_1.png") for s in stems[:2]))
    # Every file that is there was printed, and nothing else.
    printed = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert sorted(printed) == [str(tmp_path / "out" / name) for name in names(tmp_path / "out")]


def test_one_after_the_other_nothing_is_replaced(run, photos, tmp_path):
    run(photos / "a.png", *BOX)
    before = (tmp_path / "out" / "a_mask_1.png").read_bytes()
    run(photos / "a.jpg", *BOX, fails="exist already; choose another folder with --out, or replace them with --overwr")
    assert (tmp_path / "out" / "a_mask_1.png").read_bytes() == before
    result = run(photos / "a.jpg", *BOX, "--overwrite", "--format", "png")
    assert (tmp_path / "out" / "a_mask_1.png").read_bytes() != before
    assert "earlier prediction" not in result.stderr
    # A mask that the new run does not replace is named.
    (tmp_path / "out" / "a_mask_7.png").write_bytes(before)
    assert "a_mask_7.png" in run(photos / "a.jpg", *BOX, "--overwrite").stderr


@pytest.mark.parametrize("formats", ["coco", "npz", "overlay"])
def test_nothing_is_replaced_in_any_format(run, photos, formats, tmp_path):
    run(photos / "a.png", *BOX, "--format", formats)
    run(photos / "a.png", *BOX, "--format", f"png,{formats}", fails="exist already")
    assert not list((tmp_path / "out").glob("*mask*"))


def test_checked_before_the_model_is_read(carsam_cli, photos, tmp_path):
    (tmp_path / "a_mask_9.png").touch()
    result = carsam_cli("predict", tmp_path / "no-model", photos / "a.png", *BOX, "--out", tmp_path)
    assert result.exit_code == 1 and "a_mask_9.png exist already" in result.stderr


def test_long_names(run, photos, tmp_path):
    for name in ("n" * 241, "\u5199" * 80):
        long = photos / f"{name}.png"
        (photos / "a.png").rename(long)
        run(long, *BOX, "--format", "png,npz,overlay", out=tmp_path / "long")
        long.rename(photos / "a.png")
    assert len(names(tmp_path / "long")) == 6


def test_unreadable_images_are_counted(run, photos, tmp_path):
    (photos / "bad.jpg").write_bytes(b"no image")
    cut = (photos / "b.jpg").read_bytes()
    (photos / "b.jpg").write_bytes(cut[: len(cut) // 2])
    result = run(photos, *BOX, "--format", "png,coco", fails="2 of 4 images could not be read")
    assert "bad.jpg" in result.stderr and "b.jpg" in result.stderr
    assert names(tmp_path / "out") == ["a.jpg_mask_1.png", "a.png_mask_1.png", "predictions.json"]
    raw = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [image["file_name"] for image in raw["images"]] == ["a.jpg", "a.png"]
    run(photos / "bad.jpg", *BOX, fails="bad.jpg")


def test_patterns_keep_subfolders(run, photos, tmp_path):
    (photos / "x").mkdir()
    (photos / "a.png").rename(photos / "x" / "b.jpg")
    run(f"{photos}/**/b.jpg", *BOX, "--format", "png")
    assert names(tmp_path / "out") == ["b_mask_1.png", "x/b_mask_1.png"]


def test_prompts_of_json_lines(run, photos, tmp_path):
    lines = [
        {"image": "a.png", "boxes": [[10, 8, 70, 50], [30, 20, 96, 64]]},
        {"image": "b.jpg", "points": [[40, 30], [80, 10]], "labels": [1, 0]},
        {"image": "elsewhere.jpg", "boxes": [[1, 1, 9, 9]]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    result = run(photos, "--prompts", file, "--format", "png")
    assert names(tmp_path / "out") == ["a_mask_1.png", "a_mask_2.png", "b_mask_1.png"]
    assert "1 of 3 images have no prompts" in result.stderr and "1 of the 3 images in" in result.stderr
    file.write_text(json.dumps({"image": "a.png", "boxes": [[0.1, 0.1, 0.5, 0.5]]}))
    run(photos, "--prompts", file, out=tmp_path / "other", fails="on 0..1, but prompts are in pixels")


def test_prompts_of_coco_keep_ids_and_categories(run, evaluation_folder, tmp_path):
    path = evaluation_folder / "instances.json"
    image = evaluation_folder / "images" / "000000000885.jpg"
    run(image, "--prompts", path, "--format", "coco")
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    source = json.loads(path.read_text())
    expected = [a for a in source["annotations"] if a["image_id"] == 885 and not a["iscrowd"]]
    assert [entry["id"] for entry in found["images"]] == [885]
    assert [a["category_id"] for a in found["annotations"]] == [a["category_id"] for a in expected]
    names = {category["id"]: category["name"] for category in source["categories"]}
    assert all(names[category["id"]] == category["name"] for category in found["categories"])


def test_coco_boxes_of_another_form(run, evaluation_folder, tmp_path):
    """x1, y1, x2, y2 in the place of x, y, width, height contradicts the masks."""
    content = json.loads((evaluation_folder / "instances.json").read_text())
    for a in content["annotations"]:
        x, y, width, height = a["bbox"]
        a["bbox"] = [x, y, x + width, y + height]
    (tmp_path / "xyxy.json").write_text(json.dumps(content))
    run(evaluation_folder / "images", "--prompts", tmp_path / "xyxy.json", fails="look like x1, y1, x2, y2")


def test_the_orientation_that_the_prompts_mean(run, photos, nano, tmp_path):
    """EXIF turns the image, unless the COCO file's size says that its boxes were drawn on the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photos / "a.png") as image:
        image.save(photos / "turned.png", exif=exif)
    file = tmp_path / "coco.json"
    predictor = carsam.SamPredictor(nano)
    for upright in (True, False):
        height, width = (96, 64) if upright else (64, 96)
        entry = {"id": 1, "file_name": "turned.png", "height": height, "width": width}
        annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [5, 5, 50, 50], "iscrowd": 0}
        file.write_text(json.dumps({"images": [entry], "annotations": [annotation], "categories": []}))
        run(photos / "turned.png", "--prompts", file, "--format", "png", "--overwrite")
        predictor.set_image(read_image(photos / "turned.png", apply_exif=upright))
        expected = predictor.predict(box=[5, 5, 55, 55], multimask_output=False)[0][0]
        assert np.array_equal(read_mask(tmp_path / "out" / "turned_mask_1.png"), expected)


def test_everything(run, photos, nano, tmp_path):
    result = run(photos / "a.png", *LOW, "--min-mask-region-area", "4", "--format", "png,coco,overlay", "--json", "-")
    expected = carsam.SamAutomaticMaskGenerator(
        nano, points_per_side=4, pred_iou_thresh=0.1, stability_score_thresh=0.1, min_mask_region_area=4
    ).generate(read_image(photos / "a.png"))
    record = json.loads(result.stdout)["images"][0]
    assert len(record["masks"]) == len(expected) > 0
    for index, (mask, truth) in enumerate(zip(record["masks"], expected), 1):
        assert np.array_equal(read_mask(tmp_path / "out" / f"a_mask_{index}.png"), truth["segmentation"])
        assert mask["stability_score"] == truth["stability_score"] and mask["area"] == truth["area"]


def test_everything_with_nothing_sure_enough(run, photos, tmp_path):
    result = run(photos / "a.png", "--everything", "--points-per-side", "2")
    assert "no mask in 1 of 1 images" in result.stderr and "lower --pred-iou-thresh" in result.stderr
    assert names(tmp_path / "out") == ["a_overlay.png"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give a --box or a --point, a file of --prompts, or --everything"),
        ([*BOX, "--everything"], "exclude each other"),
        ([*BOX, "--prompts", "p.json"], "exclude each other"),
        (["--everything", "--multimask"], "--multimask is for prompts"),
        ([*BOX, "--points-per-side", "4"], "--points-per-side is a setting of --everything"),
        ([*BOX, "--format", "gif"], "'gif' is unknown; choose from png, overlay, npz, coco"),
        ([*BOX, "--polygons"], "add --format coco"),
        (["--box", "0.1,0.2,0.4,0.6"], "on 0..1, but prompts are in pixels"),
        (["--prompts", "none.json"], "none.json"),
    ],
)
def test_flags(flags, words, run, photos, tmp_path):
    run(photos / "a.png", *flags, fails=words)
    assert not (tmp_path / "out").exists()


def test_places(run, photos, tmp_path):
    run(photos, *BOX, out=photos, fails="is also the folder of images")
    (tmp_path / "scores.json").touch()
    run(photos, *BOX, "--json", tmp_path / "scores.json", fails="scores.json exists already")
    (photos / "a_overlay.png").write_bytes((photos / "a.png").read_bytes())
    run(photos / "a.png", photos / "a_overlay.png", *BOX, "--overwrite", out=photos, fails="is an input")
    run(photos / "a.png", *BOX, out=photos / "b.jpg" / "x", fails="cannot write")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    run(photos / "a.png", *BOX, out=tmp_path / "link", fails="which is not there")


def test_interrupted(run, carsam_cli, nano_folder, photos, tmp_path, monkeypatch):
    from carsam.predict import run as module

    read = module.read_image

    def interrupt(path, **options):
        if path.name == "b.jpg":
            raise KeyboardInterrupt
        return read(path, **options)

    monkeypatch.setattr(module, "read_image", interrupt)
    result = carsam_cli("predict", nano_folder, photos, *BOX, "--format", "png,coco", "--out", tmp_path / "out")
    assert result.exit_code == 130 and "interrupted after 2 of 3 images" in result.stderr
    assert names(tmp_path / "out") == ["a.jpg_mask_1.png", "a.png_mask_1.png", "predictions.json"]
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 2
