"""MAC's closed forms against brute force and scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from carsam.compensate.closed_form import (
    ProductStatistics,
    ValueStatistics,
    choose_damping,
    compensate_product,
    compensate_value,
    damping,
    solve_product,
)
from carsam.errors import ConfigError

HEADS, D_IN, D_HEAD, TOKENS, KEYS, SAMPLES = 2, 6, 3, 5, 9, 4


@pytest.fixture(scope="module")
def problem():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, TOKENS, D_IN, generator=g, dtype=torch.float64)
    inputs[..., -1] = 1
    keys = torch.randn(SAMPLES, HEADS, KEYS, D_HEAD, generator=g, dtype=torch.float64) + 2
    quantized = (keys * 1.5).round() / 1.5
    weight = torch.randn(HEADS, D_IN, D_HEAD, generator=g, dtype=torch.float64)
    return inputs, keys, quantized, weight


def centred(x, on):
    return x - x.mean(-2, keepdim=True) if on else x


def objective(change, inputs, keys, quantized, weight, lam, center):
    """Σ ‖X W Kᵀ − X (W + D) K̂ᵀ‖² + λ ‖D‖² of one head, as METHOD.md 7 writes it."""
    k, k_hat = centred(keys, center), centred(quantized, center)
    error = inputs @ weight @ k.transpose(-2, -1) - inputs @ (weight + change) @ k_hat.transpose(-2, -1)
    return error.square().sum() + lam * change.square().sum()


@pytest.mark.parametrize("center", [False, True])
def test_exact_solver_minimises_the_objective(problem, center):
    inputs, keys, quantized, weight = problem
    statistics = ProductStatistics()
    statistics.update(inputs, keys, quantized, center=center)
    change = compensate_product(weight, statistics, solver="exact", tolerance=1e-10, iterations=200)
    grams, others, _ = statistics.stacked()
    lam = damping(grams, others, 0.01)
    for head in range(HEADS):
        d = change[head].clone().requires_grad_()
        loss = objective(d, inputs, keys[:, head], quantized[:, head], weight[head], lam[head], center)
        loss.backward()
        nothing = objective(0 * d, inputs, keys[:, head], quantized[:, head], weight[head], lam[head], center)
        assert loss < nothing
        assert d.grad.norm() <= 1e-7 * weight.norm() * grams.sum()  # stationary


def test_centring_is_what_softmax_sees(problem):
    """A compensation of centred keys changes the attention as one of plain keys would not: it ignores row constants."""
    inputs, keys, quantized, weight = problem
    results = []
    for shift in (0.0, 7.0):  # an offset on K̂ that softmax cannot see
        statistics = ProductStatistics()
        statistics.update(inputs, keys, quantized + shift, center=True)
        results.append(compensate_product(weight, statistics, tolerance=1e-10, iterations=200))
    torch.testing.assert_close(results[0], results[1])


def test_pooled_solver_solves_the_sylvester_equation_of_the_paper(problem):
    inputs, keys, quantized, weight = problem
    statistics = ProductStatistics()
    statistics.update(inputs, keys, quantized)
    change = compensate_product(weight, statistics, solver="pooled")
    grams, others, crosses = statistics.stacked()
    lam = damping(grams, others, 0.01)
    for head in range(HEADS):
        a = float(lam[head]) * np.linalg.inv(grams.sum(0).numpy())
        b = others.mean(0)[head].numpy()
        c = -(weight[head] @ crosses.mean(0)[head]).numpy()
        np.testing.assert_allclose(change[head].numpy(), scipy.linalg.solve_sylvester(a, b, c), rtol=1e-6, atol=1e-9)


def test_pooled_and_exact_agree_on_a_single_sample(problem):
    inputs, keys, quantized, weight = problem
    statistics = ProductStatistics()
    statistics.update(inputs[:1], keys[:1], quantized[:1])
    exact = compensate_product(weight, statistics, solver="exact", tolerance=1e-12)
    torch.testing.assert_close(compensate_product(weight, statistics, solver="pooled"), exact)


def test_product_solver_against_a_dense_kronecker_system():
    g = torch.Generator().manual_seed(1)
    x, k = torch.randn(7, 4, generator=g).double(), torch.randn(8, 3, generator=g).double()
    gram, other, right = x.T @ x, (k.T @ k)[None], torch.randn(1, 4, 3, generator=g).double()
    dense = torch.kron(gram, other[0]) + 0.3 * torch.eye(12).double()
    expected = torch.linalg.solve(dense, right.reshape(-1)).view(1, 4, 3)
    torch.testing.assert_close(solve_product(gram, other, right, torch.tensor([0.3]).double()), expected)


def test_no_error_means_no_compensation(problem):
    inputs, keys, _, weight = problem
    statistics = ProductStatistics()
    statistics.update(inputs, keys, keys)
    for solver in ("pooled", "exact"):
        assert compensate_product(weight, statistics, solver=solver).abs().max() < 1e-12
    value = ValueStatistics()
    probs = torch.softmax(torch.randn(SAMPLES, HEADS, TOKENS, KEYS), -1)
    value.update(torch.randn(SAMPLES, KEYS, D_IN), probs, probs, torch.randn(SAMPLES, HEADS, KEYS, D_HEAD))
    assert compensate_value(value).abs().max() < 1e-12


def test_value_branch_minimises_the_error_of_pv():
    g = torch.Generator().manual_seed(2)
    inputs = torch.randn(SAMPLES, KEYS, D_IN, generator=g)
    weight = torch.randn(HEADS, D_IN, D_HEAD, generator=g)
    value = inputs[:, None] @ weight
    probs = torch.softmax(torch.randn(SAMPLES, HEADS, TOKENS, KEYS, generator=g), -1)
    coarse = (probs * 4).round() / 4
    statistics = ValueStatistics()
    statistics.update(inputs, probs, coarse, value)
    change = compensate_value(statistics, relative_damping=1e-6).float().requires_grad_()
    target = probs @ value

    def loss(d):
        return (coarse @ (inputs[:, None] @ (weight + d)) - target).square().sum()

    found = loss(change)
    found.backward()
    assert found < loss(torch.zeros_like(change))
    assert change.grad.abs().max() < 1e-2 * target.square().sum().sqrt()  # stationary up to the damping, in float32


@pytest.mark.parametrize("arguments", [{"solver": "sylvester"}, {"relative_damping": 0.0}])
def test_bad_settings_are_refused(problem, arguments):
    inputs, keys, quantized, weight = problem
    statistics = ProductStatistics()
    statistics.update(inputs, keys, quantized)
    with pytest.raises(ConfigError):
        compensate_product(weight, statistics, **arguments)


def float_problem(problem):
    """The problem with other inputs in the float model, and the operand in force: changed, then quantized."""
    inputs, keys, quantized, weight = problem
    g = torch.Generator().manual_seed(3)
    floating = inputs + 0.1 * torch.randn(inputs.shape, generator=g, dtype=torch.float64)
    own = ((inputs[:, None] @ weight + 0.3) * 2).round() / 2
    return inputs, floating, keys, quantized, weight, own


@pytest.mark.parametrize("with_own", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_float_targets_and_what_is_left_are_minimised(problem, center, with_own):
    """Equations (2) and (3): min Σ ‖X̄ W Kᵀ − (Q̂ + X D) K̂ᵀ‖² + λ‖D‖², with Q̂ = X W in (2)."""
    inputs, floating, keys, quantized, weight, own = float_problem(problem)
    statistics = ProductStatistics()
    statistics.update(inputs, keys, quantized, center=center, float_inputs=floating, own=own if with_own else None)
    change = compensate_product(weight, statistics, tolerance=1e-10, iterations=200)
    grams, others, _ = statistics.stacked()
    lam = damping(grams, others, 0.01)
    for head in range(HEADS):
        k, k_hat = centred(keys[:, head], center), centred(quantized[:, head], center)
        operand = own[:, head] if with_own else inputs @ weight[head]

        def loss(d, head=head, k=k, k_hat=k_hat, operand=operand):
            error = floating @ weight[head] @ k.transpose(-2, -1) - (operand + inputs @ d) @ k_hat.transpose(-2, -1)
            return error.square().sum() + lam[head] * d.square().sum()

        d = change[head].clone().requires_grad_()
        found = loss(d)
        found.backward()
        assert found < loss(torch.zeros_like(d))
        assert d.grad.norm() <= 1e-7 * weight.norm() * grams.sum()  # stationary


def test_float_inputs_that_are_the_inputs_change_nothing(problem):
    inputs, keys, quantized, weight = problem
    plain, asymmetric, left = ProductStatistics(), ProductStatistics(), ProductStatistics()
    plain.update(inputs, keys, quantized)
    asymmetric.update(inputs, keys, quantized, float_inputs=inputs)
    left.update(inputs, keys, quantized, float_inputs=inputs, own=inputs[:, None] @ weight)
    for solver in ("pooled", "exact"):
        changes = [compensate_product(weight, s, solver=solver, tolerance=1e-10) for s in (plain, asymmetric, left)]
        torch.testing.assert_close(changes[1], changes[0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(changes[2], changes[0], rtol=1e-6, atol=1e-9)


def test_damping_is_chosen_by_held_out_items(problem):
    """Errors that every item shares want almost no damping; what held-out items contradict is not compensated."""
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(HEADS, D_IN, D_HEAD, generator=g, dtype=torch.float64)
    shared, contradicted = ProductStatistics(), ProductStatistics()
    for item in range(8):
        inputs = torch.randn(1, TOKENS, D_IN, generator=g, dtype=torch.float64)
        keys = torch.randn(1, HEADS, KEYS, D_HEAD, generator=g, dtype=torch.float64)
        shared.update(inputs, keys, 0.8 * keys)
        contradicted.update(inputs, keys, (1.25 if item % 4 == 3 else 0.8) * keys)
    assert choose_damping(weight, shared) == 0.01
    assert choose_damping(weight, contradicted) is None
    few = ProductStatistics()
    few.update(inputs, keys, 0.8 * keys)
    assert choose_damping(weight, few) is None  # nothing to judge by
