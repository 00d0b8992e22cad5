"""Meta checkpoints load to the outputs of Meta's own package (1e-4), and their architecture is recognised.

ViT-L and ViT-H: ``python tools/check_parity.py --size vit_l --size vit_h``.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import SamModel

from carsam.models.load import load_model
from carsam.models.sam.meta import infer_config, key_map
from carsam.models.sam.random import sam_config
from carsam.models.skeleton import skeleton

# find_spec does not run the package, which would want torchvision.
if importlib.util.find_spec("segment_anything") is None:
    pytest.skip("segment-anything is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

import check_parity  # noqa: E402
from torchvision_shim import import_segment_anything  # noqa: E402

CASES = [(name, multimask) for name in check_parity.prompts() for multimask in (True, False)]


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory):
    """Meta's ViT-B, and carsam's reading of its file."""
    path = tmp_path_factory.mktemp("meta") / "sam_vit_b.pth"
    sam = check_parity.reference_sam("vit_b")
    torch.save(sam.state_dict(), path)
    model = load_model(path)
    path.unlink()  # 375 MB; and the model must not depend on the file any more
    return sam, model


@pytest.fixture(scope="module")
def outputs(vit_b):
    sam, model = vit_b
    image = check_parity.sample_image()
    return check_parity.meta_outputs(sam, image), check_parity.carsam_outputs(model, image)


def test_image_embeddings_agree(outputs):
    (expected, _), (actual, _) = outputs
    assert check_parity.difference(actual, expected) < 1e-4


@pytest.mark.parametrize(("name", "multimask"), CASES)
def test_masks_and_scores_agree(outputs, name, multimask):
    (_, expected), (_, actual) = outputs
    masks, scores = expected[name, multimask]
    assert masks.std() > 0.3, "logits too small for a tolerance of 1e-4 to mean anything"
    assert check_parity.difference(actual[name, multimask][0], masks) < 1e-4
    assert check_parity.difference(actual[name, multimask][1], scores) < 1e-4


def test_every_norm_has_metas_eps(vit_b):
    sam, model = vit_b
    names = key_map(model)
    ours = {names[f"{name}.weight"]: module.eps for name, module in model.named_modules() if hasattr(module, "eps")}
    theirs = {f"{name}.weight": module.eps for name, module in sam.named_modules() if hasattr(module, "eps")}
    assert ours == theirs


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_architecture_and_names_follow_from_shapes(size):
    with torch.device("meta"):
        state = import_segment_anything().sam_model_registry[size]().state_dict()
    config, published = infer_config(state), sam_config(size.replace("_", "-"))
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        inferred, expected = getattr(config, part).to_dict(), getattr(published, part).to_dict()
        if part == "mask_decoder_config":
            assert inferred.pop("layer_norm_eps") == 1e-5  # Meta's; transformers publishes 1e-6
            expected.pop("layer_norm_eps")
        assert inferred == expected
    assert set(key_map(skeleton(SamModel, config)).values()) == set(state)
