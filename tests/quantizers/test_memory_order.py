"""Large maps with their channels last: the same numbers as in the order of their shape, without reordering."""

import pytest
import torch

from carsam.quantizers import ActivationQuantizer, simulate
from carsam.quantizers.simulation import LARGE_MAP, channels_last, keep_mask_like


@pytest.fixture(scope="module")
def large():
    """A map (1, channels, height, width) that lies with its channels last."""
    side = int((LARGE_MAP / 16) ** 0.5) + 1
    return torch.randn(1, side, side, 16, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)


def test_only_large_maps_in_that_order_count(large):
    assert channels_last(large)
    assert not channels_last(large.contiguous())
    assert not channels_last(large[:, :, :8])
    assert not channels_last(large[0])


def test_gradients_do_not_depend_on_the_order_in_memory(large):
    quantizer = ActivationQuantizer(4)
    quantizer.set_range(-1.5, 2.0)
    weights = torch.randn(large.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for x in (large, large.contiguous()):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        scale = quantizer.learn_scale()
        with simulate(activations=True):
            (quantizer(x) * weights).sum().backward()
        gradients.append((x.grad, scale.grad))
    (x_first, scale_first), (x_second, scale_second) = gradients
    assert torch.equal(x_first, x_second)
    # A sum of a million float32 in another order: about 1e-4 of it.
    torch.testing.assert_close(scale_first, scale_second, rtol=1e-3, atol=1e-2)


def test_masks_lie_as_the_map_does_and_keep_their_share(large):
    mask = keep_mask_like(large, 0.5)
    assert mask.shape == large.shape and mask.stride() == large.stride()
    assert mask.float().mean().item() == pytest.approx(0.5, abs=0.01)
