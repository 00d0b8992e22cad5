"""A MobileSAM at its published size gives the outputs of its published code (1e-4), on weights drawn here."""

import pytest
import torch
from tinyvit_packages import MOBILESAM, import_package
from torch import nn

from carsam.data.images.normalisation import IMAGENET, normalisation_of
from carsam.data.images.reading import read_image
from carsam.data.images.transforms import Preprocessor
from carsam.models.tinyvit.meta import tinyvit_from_meta

PROMPTS = {
    "box": {"boxes": torch.tensor([[100.0, 150.0, 700.0, 600.0]])},
    "points": {"points": (torch.tensor([[[300.0, 200.0], [700.0, 640.0]]]), torch.tensor([[1, 0]]))},
    "mask": {
        "boxes": torch.tensor([[5.0, 9.0, 400.0, 300.0]]),
        "masks": torch.linspace(-4, 4, 256**2).view(1, 1, 256, 256),
    },
}


@pytest.fixture(scope="module")
def published():
    """The package's own ViT-T with weights and batch norms that leave every part something to say."""
    (build,) = import_package(MOBILESAM, "mobile_sam.build_sam")
    sam = build.build_sam_vit_t()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in sam.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5)):
                    tensor.copy_(low + torch.rand(tensor.shape, generator=random))
                for tensor in (module.bias, module.running_mean):
                    tensor.copy_(0.3 * torch.randn(tensor.shape, generator=random))
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                spread = (2 / module.weight[0].numel()) ** 0.5
                module.weight.copy_(spread * torch.randn(module.weight.shape, generator=random))
            elif hasattr(module, "attention_biases"):
                module.attention_biases.copy_(torch.randn(module.attention_biases.shape, generator=random))
    return sam.train().eval()  # its attentions keep what they computed from the biases until the mode changes


@pytest.fixture(scope="module")
def model(published):
    return tinyvit_from_meta(published.state_dict())


@pytest.fixture(scope="module")
def pixels(model, evaluation_folder):
    return Preprocessor.for_model(model)(read_image(evaluation_folder / "images" / "000000000885.jpg"))[0]


@pytest.fixture(scope="module")
@torch.no_grad()
def embeddings(published, model, pixels):
    return published.image_encoder(pixels), model.get_image_embeddings(pixels)


def test_the_architecture_is_the_published_one(published, model):
    vision = model.config.vision_config
    assert (vision.image_size, vision.patch_kernel) == (1024, 3)
    assert (vision.depths, vision.num_heads, vision.window_sizes) == ([2, 2, 6, 2], [4, 5, 10], [7, 14, 7])
    assert model.config.prompt_encoder_config.image_embedding_size == 64
    assert normalisation_of(model) == IMAGENET
    # Folded, a batch norm has one number a channel instead of two to learn; the classifier is gone.
    norms = sum(m.num_features for m in published.modules() if isinstance(m, nn.BatchNorm2d))
    head = sum(p.numel() for name, p in published.image_encoder.named_parameters() if "head" in name)
    fourier = published.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.numel()  # a buffer there
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (model, published))
    assert ours == theirs - norms - head + fourier


def test_image_embeddings_agree(embeddings):
    expected, actual = embeddings
    assert expected.shape == (1, 256, 64, 64)
    assert expected.std() > 0.3
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("name", PROMPTS)
@torch.no_grad()
def test_masks_and_scores_agree(published, model, pixels, embeddings, name, multimask):
    prompts = {"points": None, "boxes": None, "masks": None, **PROMPTS[name]}
    sparse, dense = published.prompt_encoder(**prompts)
    masks, scores = published.mask_decoder(
        image_embeddings=embeddings[0],
        image_pe=published.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )
    points, labels = prompts["points"] or (None, None)
    output = model(
        image_embeddings=embeddings[1],
        input_points=None if points is None else points[:, None],
        input_labels=None if labels is None else labels[:, None],
        input_boxes=None if prompts["boxes"] is None else prompts["boxes"][None],
        input_masks=prompts["masks"],
        multimask_output=multimask,
    )
    assert masks.std() > 0.3, "logits too small for a tolerance of 1e-4 to mean anything"
    assert (output.pred_masks[0] - masks).abs().max() < 1e-4
    assert (output.iou_scores[0] - scores).abs().max() < 1e-4
