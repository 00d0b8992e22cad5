"""A model with a memory is diagnosed on images: its image encoder and decoder, as the image model's."""

from small_models import small_model

import carsam
from carsam.config import CalibrationConfig, QuantizeConfig
from carsam.diagnose.run import diagnose
from carsam.models.family import find_sites


def test_sites_on_images_are_those_of_the_image_model():
    image, video = (find_sites(small_model(name)) for name in ("sam2", "sam2_video"))
    assert video.on_images().names == image.names
    assert image.on_images() == image
    assert set(video.names) - set(image.names) == {
        name for name in video.names if name.startswith(("memory_encoder.", "memory_attention."))
    }


def test_diagnosis(tmp_path, calibration_folder):
    model = small_model("sam2_video")
    model.save_pretrained(tmp_path / "float")
    observers = {"weight_observer": "min-max", "activation_observer": "min-max"}
    data = CalibrationConfig(coco=str(calibration_folder / "instances.json"), n_images=1, boxes_per_image=2)
    config = QuantizeConfig("rtn", observers, "w4a4", calibration=data)
    carsam.quantize(tmp_path / "float", calibration_folder / "images", config, out=tmp_path / "packed")
    images = calibration_folder / "images"
    options = {"coco": calibration_folder / "instances.json", "limit": 1, "prompts": 1, "with_sensitivity": False}
    found, _ = diagnose(tmp_path / "float", tmp_path / "packed", images, **options)
    seen = {entry.site for entry in found.sites}
    assert seen == {name for name in find_sites(model).on_images().names if name in seen} and len(seen) > 50
    assert not any(name.startswith("memory") for name in seen)
