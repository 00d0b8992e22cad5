"""Random models: the same for the same seed, of a sane scale, and without touching the global random state."""

import pytest
import torch
from tinyvit_state import SIDES

from carsam.data.images.normalisation import IMAGENET, STRETCHED, normalisation_of
from carsam.models.tinyvit.random import random_tinyvit


@pytest.mark.parametrize("kind", ["mobilesam", "litemedsam"])
def test_activations_keep_a_sane_scale(kind):
    model = random_tinyvit(kind, SIDES[kind])
    scales = []
    for module in (model.vision_encoder.patch_embed, *model.vision_encoder.layers, model.vision_encoder.neck):
        module.register_forward_hook(lambda _, inputs, output: scales.append(output.std().item()))
    noise = torch.randn(1, 3, SIDES[kind], SIDES[kind], generator=torch.Generator().manual_seed(0))
    model.get_image_embeddings(noise)
    assert len(scales) == 17
    assert 0.05 < min(scales) <= max(scales) < 5


def test_the_seed_decides():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (random_tinyvit("litemedsam", 32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    name = "vision_encoder.layers.3.attn.attention_biases"
    first, again, other = (model.state_dict()[name] for model in (first, again, other))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pixels_are_normalised_as_published():
    assert normalisation_of(random_tinyvit("mobilesam", 64)) == IMAGENET
    assert normalisation_of(random_tinyvit("litemedsam", 32)) == STRETCHED
