"""Scores against brute force, perfect predictions and plain pycocotools."""

import contextlib
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from places import EVALUATION_COCO as COCO_FILE
from places import EVALUATION_IMAGES as IMAGES
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from carsam.data.coco.instances import CocoInstances
from carsam.data.images.transforms import Preprocessor
from carsam.errors import CheckpointError, ConfigError, DataError, DeviceError
from carsam.evaluate import coco_metrics
from carsam.evaluate.coco_metrics import evaluate_coco, evaluating
from carsam.evaluate.points import evaluate_points
from carsam.evaluate.scores import CocoResult
from carsam.output.files import write_json


@pytest.fixture(scope="module")
def model(nano):
    return nano


@pytest.fixture(scope="module")
def instances():
    return CocoInstances.from_file(COCO_FILE)


@pytest.fixture(scope="module")
def result(model):
    return evaluate_coco(model, COCO_FILE, IMAGES, prompts_per_batch=5)


def plain_reference(model):
    """The same evaluation, written down straight: model.forward, one prompt at a time, files through pycocotools."""
    truth = json.loads(COCO_FILE.read_text())
    instances = CocoInstances.from_file(COCO_FILE)
    preprocess = Preprocessor.for_model(model)
    results, ious = [], []
    for image in instances.images:
        pixels, geometry = preprocess(instances.read_image(image, IMAGES))
        embeddings = model.get_image_embeddings(pixels)
        for annotation in truth["annotations"]:
            if annotation["image_id"] != image.id or annotation["iscrowd"]:
                continue
            x, y, w, h = annotation["bbox"]
            box = torch.tensor(geometry.boxes_to_input(np.array([[[x, y, x + w, y + h]]]))).float()
            with torch.no_grad():
                output = model(image_embeddings=embeddings, input_boxes=box, multimask_output=False)
            mask = geometry.masks_to_original(output.pred_masks[0, 0, 0], 256).numpy() > 0
            target = mask_utils.decode(annotation["segmentation"]).astype(bool)
            ious.append(np.logical_and(mask, target).sum() / max(1, np.logical_or(mask, target).sum()))
            rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
            entry = {"image_id": image.id, "category_id": annotation["category_id"], "score": output.iou_scores.item()}
            results.append((entry, rle))
    aps = []
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(COCO_FILE))
        for kind, key, convert in (
            ("segm", "segmentation", lambda r: r),
            ("bbox", "bbox", lambda r: list(mask_utils.toBbox(r))),
        ):
            loaded = coco.loadRes([{**entry, key: convert(rle)} for entry, rle in results])
            evaluation = COCOeval(coco, loaded, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            aps.append(100 * evaluation.stats[0])
    return aps[0], aps[1], 100 * np.mean(ious), ious


def test_equals_plain_pycocotools(model, result):
    segm_ap, box_ap, mean_iou, ious = plain_reference(model)
    assert result.segm_ap == pytest.approx(segm_ap, abs=0.05)
    assert result.box_ap == pytest.approx(box_ap, abs=0.05)
    assert result.mean_iou == pytest.approx(mean_iou, abs=0.01)
    found = [iou for score in result.per_image for iou in score.ious]
    assert found == pytest.approx([100 * iou for iou in ious], abs=0.5)


def test_result(result, instances, tmp_path):
    assert result.n_images == len(instances.images) == len(result.per_image)
    assert result.n_prompts == sum(len(instances.boxes(image.id)) for image in instances.images)
    values = result.to_dict()
    assert {"segm_ap", "box_ap", "mean_iou", "n_images", "n_prompts", "per_image"} <= set(values)
    assert CocoResult.from_dict(json.loads(json.dumps(values))) == result
    assert set(values["per_image"][0]) == {"name", "mean_iou", "ious"}
    result.save(tmp_path / "new" / "results.json")
    saved = json.loads((tmp_path / "new" / "results.json").read_text())
    assert saved["segm_ap"] == result.segm_ap
    assert saved["per_image"][0]["ious"] == list(result.per_image[0].ious)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["results.json"]
    assert f"segm AP {result.segm_ap:.1f}" in str(result)
    assert result.n_objects == 71 and "rests on 71 objects" in result.notes[0]
    low, high = result.mean_iou_interval
    assert low < result.mean_iou < high


def test_no_not_a_number_is_saved_and_the_old_file_stays(tmp_path):
    write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "r.json", {"a": math.nan})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_perfect_model(model, monkeypatch):
    """The whole evaluation with masks that are the objects, in place of the model's."""
    monkeypatch.setattr(coco_metrics, "box_masks", lambda model, image, *_: [(mask, 1.0) for mask in image.truth])
    result = evaluate_coco(model, COCO_FILE, IMAGES)
    assert result.segm_ap == pytest.approx(100) and result.mean_iou == pytest.approx(100)
    sizes = [result.segm_ap_small, result.segm_ap_medium, result.segm_ap_large, result.segm_ap75, result.box_ap50]
    assert sizes == pytest.approx([100] * 5)
    assert result.mean_iou_interval == pytest.approx((100, 100))


def write_detections(path, instances, change=lambda d: d):
    entries = [
        change({"image_id": image.id, "category_id": a.category_id, "bbox": a.bbox, "score": 1.0})
        for image in instances.images
        for a in instances.instances(image.id)
    ]
    path.write_text(json.dumps(entries))
    return path


def test_ground_truth_boxes_as_detections(model, instances, result, tmp_path):
    found = evaluate_coco(model, COCO_FILE, IMAGES, detections=write_detections(tmp_path / "d.json", instances))
    assert found.segm_ap == pytest.approx(result.segm_ap, abs=0.05)
    assert found.box_ap == pytest.approx(result.box_ap, abs=0.05)
    # The best-overlapping object of the category can only be better than the own one.
    assert found.mean_iou >= result.mean_iou - 0.01


def test_detections_of_unknown_categories(model, instances, tmp_path, caplog):
    """Positions 0..79 or names in place of ids would score 0.00 without a word."""
    detections = write_detections(tmp_path / "d.json", instances, lambda d: {**d, "category_id": 9999})
    with pytest.raises(DataError, match="no category of the detections"):
        evaluate_coco(model, COCO_FILE, IMAGES, detections=detections, limit=2)
    changed = iter([9999])
    detections = write_detections(
        tmp_path / "d.json", instances, lambda d: {**d, "category_id": next(changed, d["category_id"])}
    )
    found = evaluate_coco(model, COCO_FILE, IMAGES, detections=detections, limit=2)
    whole = evaluate_coco(model, COCO_FILE, IMAGES, limit=2)
    assert found.n_prompts == whole.n_prompts - 1
    assert "1 of 20 detections left out" in caplog.text and "9999" in caplog.text


def test_detections_for_other_images(model, instances, tmp_path):
    detections = write_detections(tmp_path / "d.json", instances, lambda d: {**d, "image_id": -1})
    with pytest.raises(DataError, match=r"none of the \d+ detections"):
        evaluate_coco(model, COCO_FILE, IMAGES, detections=detections)
    detections = write_detections(tmp_path / "d.json", instances, lambda d: {**d, "bbox": [9000, 0, 5, 5]})
    with pytest.raises(DataError, match="no box prompt"):
        evaluate_coco(model, COCO_FILE, IMAGES, detections=detections)


def test_limit_and_progress(model):
    calls = []
    result = evaluate_coco(model, COCO_FILE, IMAGES, limit=2, progress=lambda *call: calls.append(call))
    assert result.n_images == 2 and calls == [(1, 2), (2, 2)]
    with pytest.raises(ConfigError, match="prompts_per_batch"):
        evaluate_coco(model, COCO_FILE, IMAGES, prompts_per_batch=0)
    with pytest.raises(DataError, match="limit of 0"):
        evaluate_coco(model, COCO_FILE, IMAGES, limit=0)


def edited(tmp_path, edit):
    content = json.loads(COCO_FILE.read_text())
    content["images"] = content["images"][:2]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    edit(content)
    (tmp_path / "edited.json").write_text(json.dumps(content))
    return tmp_path / "edited.json"


def test_boxes_without_area_are_dropped_but_stay_missed(model, tmp_path, caplog):
    def edit(content):
        content["annotations"][0]["bbox"] = [5, 5, 0, 10]

    whole = evaluate_coco(model, edited(tmp_path, lambda content: None), IMAGES)
    dropped = evaluate_coco(model, edited(tmp_path, edit), IMAGES)
    assert dropped.n_prompts == whole.n_prompts - 1
    assert "1 boxes without area" in caplog.text and "count as missed" in caplog.text
    assert dropped.segm_ap <= whole.segm_ap + 1e-9


def test_images_without_prompts_count(model, tmp_path):
    def edit(content):
        first = content["images"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]

    result = evaluate_coco(model, edited(tmp_path, edit), IMAGES)
    assert result.n_images == 2
    assert result.per_image[0].mean_iou is None and result.per_image[0].ious == ()
    assert json.dumps(result.to_dict(), allow_nan=False)


def test_crowds_are_no_prompts(model, tmp_path):
    def edit(content):
        for a in content["annotations"]:
            a["iscrowd"] = 1

    with pytest.raises(DataError, match="no objects"):
        evaluate_coco(model, edited(tmp_path, edit), IMAGES)


def test_missing_images(model, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(IMAGES.iterdir())[:4]:
        shutil.copy(path, folder / path.name)
    with pytest.raises(DataError, match=r"7 of the 11 images .* are not in"):
        evaluate_coco(model, COCO_FILE, folder)
    with pytest.raises(DataError, match="no image folder"):
        evaluate_coco(model, COCO_FILE, tmp_path / "none")
    with pytest.raises(DataError, match="lists no images"):
        evaluate_coco(model, edited(tmp_path, lambda content: content["images"].clear()), folder)


def test_damaged_image(model, instances, tmp_path):
    (tmp_path / instances.images[0].file_name).write_bytes(b"no")
    with pytest.raises(DataError, match="cannot read"):
        evaluate_coco(model, COCO_FILE, tmp_path, limit=1)


def test_evaluating_restores_the_mode(model):
    model.train()
    with evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()
    model.eval()


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_missing_device(model, device):
    with pytest.raises(DeviceError, match=device), evaluating(model, device):
        pass
    assert model.device.type == "cpu"


def test_values_that_are_not_finite(fresh_nano, instances):
    with torch.no_grad():
        next(fresh_nano.mask_decoder.iou_prediction_head.parameters())[0] = math.nan
    with pytest.raises(CheckpointError, match=f"not finite for the image {instances.images[0].file_name}"):
        evaluate_coco(fresh_nano, COCO_FILE, IMAGES, limit=2)
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate_points(fresh_nano, COCO_FILE, IMAGES, limit=1)


def test_the_files_own_areas_do_not_count(model, tmp_path):
    """Negative, huge or missing areas would give AP -100 or move it."""
    whole = evaluate_coco(model, edited(tmp_path, lambda content: None), IMAGES)
    for area in (-5.0, 1e12):

        def edit(content, area=area):
            for annotation in content["annotations"]:
                annotation["area"] = area

        assert evaluate_coco(model, edited(tmp_path, edit), IMAGES) == whole


def test_a_later_mask_that_cannot_be_read_stops_before_the_first_prediction(model, tmp_path):
    def edit(content):
        content["annotations"][-1]["segmentation"] = {"size": [3, 4], "counts": "11"}

    calls = []
    with pytest.raises(DataError, match="annotation"):
        evaluate_coco(model, edited(tmp_path, edit), IMAGES, progress=lambda *call: calls.append(call))
    assert not calls


def numbered(tmp_path, name, identify):
    """The first images with other image ids, which pycocotools would sort or mix up."""

    def edit(content):
        ids = {image["id"]: identify(i, image["id"]) for i, image in enumerate(content["images"])}
        for entry in (*content["images"], *content["annotations"]):
            key = "image_id" if "image_id" in entry else "id"
            entry[key] = ids[entry[key]]

    folder = tmp_path / name
    folder.mkdir()
    return edited(folder, edit)


def test_ids_may_be_text(model, tmp_path):
    expected = evaluate_coco(model, edited(tmp_path, lambda content: None), IMAGES)
    assert evaluate_coco(model, numbered(tmp_path, "text", lambda i, _: f"image {9 - i}"), IMAGES) == expected
