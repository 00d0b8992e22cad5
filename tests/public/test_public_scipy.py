"""scipy's least squares; its Sylvester solver is in tests/compensate. Density, peaks and k-means are scipy's own."""

import numpy as np
import pytest
import scipy.linalg
import torch

from carsam.compensate.closed_form import (
    ProductStatistics,
    ValueStatistics,
    compensate_product,
    compensate_value,
    damping,
)

SAMPLES, TOKENS, KEYS, HEADS, D_IN, D_HEAD = 3, 7, 9, 2, 5, 4


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("relative", [1e-3, 1e-1])
def test_exact_compensation_is_the_least_squares_solution(relative):
    """min over D of Σ ‖X W E ᵀ + X D K̂ᵀ‖² + λ‖D‖² as one dense system in vec(D)."""
    inputs, weight = normal(SAMPLES, TOKENS, D_IN, seed=0), normal(HEADS, D_IN, D_HEAD, seed=1)
    keys = normal(SAMPLES, HEADS, KEYS, D_HEAD, seed=2)
    coarse = keys.round()
    statistics = ProductStatistics()
    statistics.update(inputs, keys, coarse)
    ours = compensate_product(
        weight, statistics, relative_damping=relative, solver="exact", tolerance=1e-10, iterations=500
    )
    grams, others, _ = statistics.stacked()
    lam = damping(grams, others, relative)
    for head in range(HEADS):
        rows = [np.kron(x, k) for x, k in zip(inputs.numpy(), coarse[:, head].numpy())]
        missing = inputs @ weight[head] @ (keys - coarse)[:, head].transpose(-2, -1)
        system = np.concatenate([*rows, np.sqrt(float(lam[head])) * np.eye(D_IN * D_HEAD)])
        right = np.concatenate([missing.flatten().numpy(), np.zeros(D_IN * D_HEAD)])
        expected = scipy.linalg.lstsq(system, right)[0].reshape(D_IN, D_HEAD)
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(ours[head].numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("queries", [4, 20])  # fewer and more than keys: two orders of the products
def test_value_compensation_is_the_least_squares_solution(queries):
    inputs, values = normal(SAMPLES, KEYS, D_IN, seed=3), normal(SAMPLES, HEADS, KEYS, D_HEAD, seed=4)
    probs = torch.softmax(2 * normal(SAMPLES, HEADS, queries, KEYS, seed=5), -1)
    coarse = (probs * 7).round() / 7
    statistics = ValueStatistics()
    statistics.update(inputs, probs, coarse, values)
    ours = compensate_value(statistics, relative_damping=0.01)
    for head in range(HEADS):
        mixed = (coarse[:, head] @ inputs).flatten(0, 1).numpy()
        missing = ((probs - coarse)[:, head] @ values[:, head]).flatten(0, 1).numpy()
        root = np.sqrt(0.01 * np.trace(mixed.T @ mixed) / D_IN)
        system = np.concatenate([mixed, root * np.eye(D_IN)])
        expected = scipy.linalg.lstsq(system, np.concatenate([missing, np.zeros((D_IN, D_HEAD))]))[0]
        np.testing.assert_allclose(ours[head].numpy(), expected, rtol=1e-7, atol=1e-9)
