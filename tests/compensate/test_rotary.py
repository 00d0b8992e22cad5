"""MAC where queries and keys are turned by their positions: the memory attention of a SAM 2."""

import copy

import pytest
import torch
from small_models import small_model

from carsam.bits.plan import BitPlan
from carsam.calibrate.capture import capture_call
from carsam.calibrate.observers import RangeRecorder
from carsam.compensate.closed_form import ProductStatistics, compensate_product, damping
from carsam.compensate.mac import Coupled, MacSettings, attention_calls, compensate_attention, split_heads
from carsam.methods.base import Method
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.models.rotation import Rotation
from carsam.prompts.clips import PromptedClip
from carsam.quantizers import simulate
from carsam.run.walk import fit_weights

POSITIONS, DIM, INPUTS = 3, 4, 5


@pytest.fixture
def rotation():
    angles = torch.rand(POSITIONS, DIM // 2, generator=torch.Generator().manual_seed(0)).double() * 6
    return Rotation(angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1))


def matrices(rotation):
    """R_t of every token, from turning the rows of the unit matrix."""
    return [Rotation(cos, sin).turn(torch.eye(DIM).double()) for cos, sin in zip(rotation.cos, rotation.sin)]


def test_turning(rotation):
    values = torch.randn(2, POSITIONS, DIM).double()
    want = torch.stack([values[:, t] @ r for t, r in enumerate(matrices(rotation))], 1)
    torch.testing.assert_close(rotation.turn(values), want)
    torch.testing.assert_close(rotation.turn_back(want), values)
    matrix = torch.randn(2, DIM, DIM).double()
    torch.testing.assert_close(
        rotation.mean(matrix), torch.stack([r @ matrix @ r.T for r in matrices(rotation)]).mean(0)
    )


def test_against_dense_least_squares(rotation):
    """Exact where inputs have the same second moments at every position: all of them, at each."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 1, INPUTS, generator=draw).double().repeat(1, POSITIONS, 1)  # a sample each
    keys = torch.randn(1, 1, 7, DIM, generator=draw).double().expand(6, -1, -1, -1)
    quantized = keys + 0.2 * torch.randn(1, 1, 7, DIM, generator=draw).double()
    weight = torch.randn(1, INPUTS, DIM, generator=draw).double()
    statistics = ProductStatistics()
    statistics.update(inputs, keys, quantized, rotation=rotation)
    found = compensate_product(weight, statistics, relative_damping=1e-3, tolerance=1e-9, iterations=200)
    # Rows of the dense problem: x_t D R_t K̂ᵀ = x_t W R_t (K − K̂)ᵀ for every sample and token, D flattened.
    rows, right = [], []
    for sample in range(6):
        for token, turned in enumerate(matrices(rotation)):
            x, k_hat = inputs[sample, token], quantized[sample, 0]
            rows.append(torch.kron(x[None], k_hat @ turned.T))
            right.append(x @ weight[0] @ turned @ (keys[sample, 0] - k_hat).T)
    grams, others, _ = statistics.stacked()
    lam = damping(grams, others, 1e-3)
    a = torch.cat([*rows, lam.sqrt() * torch.eye(INPUTS * DIM).double()])
    b = torch.cat([*right, torch.zeros(INPUTS * DIM).double()])
    want = torch.linalg.lstsq(a, b[:, None]).solution.view(INPUTS, DIM)
    torch.testing.assert_close(found[0], want, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def memory():
    """A model with a memory at 4 bits, ranges set on its own memory, and the runs that reach its memory attention."""
    model = copy.deepcopy(small_model("sam2_video"))
    sites, method = find_sites(model), Method()
    draw = torch.Generator().manual_seed(0)
    clips = []
    for number in range(2):
        base = torch.nn.functional.interpolate(torch.randn(1, 3, 16, 16, generator=draw), (128, 128), mode="bilinear")
        frames = torch.cat([base.roll(4 * step, -1) for step in range(3)])
        clips.append(PromptedClip(f"clip {number}", frames[:1], torch.tensor([[20.0, 20, 90, 80]]), frames=frames))
    prepare_model(model, sites, BitPlan.parse("w4a4"), method.quantizer_for, method.softmax_for)
    model.requires_grad_(False)
    fit_weights(model, "mse")
    recorder = RangeRecorder([model])
    with recorder.recording(), simulate(weights=True):
        for clip in clips:
            sites.family.forward(model, clip)
    recorder.apply("mse")
    return model, sites, [lambda clip=clip: sites.family.forward(model, clip) for clip in clips]


@torch.no_grad()
def test_queries_and_keys_are_turned_as_the_model_turns_them(memory):
    model, sites, runs = memory
    for site in sites.attentions:
        if not site.rotary:
            continue
        attention = Coupled.of(model, site)
        (call,) = attention_calls(attention, runs[:1], quantized=False)
        seen = {}
        for which in ("query", "key"):
            operand = getattr(attention.module.matmul, which)
            (seen[which],), _ = capture_call(operand, lambda module=attention.module, call=call: module(**call))
        query, key = (split_heads(attention.layers[which](call[which]), attention.heads) for which in ("query", "key"))
        query, key = attention.turned(query, key, call)
        torch.testing.assert_close(query, seen["query"])
        torch.testing.assert_close(key, seen["key"])
        assert not torch.equal(key, split_heads(attention.layers["key"](call["key"]), attention.heads))


@pytest.mark.parametrize("kind", ["self_attn", "cross_attn_image"])
def test_the_error_of_the_scores_falls(memory, kind):
    model, sites, _ = memory
    model = copy.deepcopy(model)
    runs = [lambda run=run: run() for run in memory[2]]
    site = next(site for site in sites.attentions if site.rotary and site.name.endswith(kind))
    # The runs follow objects with the fixture's own model, whose attention has the same inputs.
    attention, copied = Coupled.of(memory[0], site), model.get_submodule(site.name)
    calls = list(attention_calls(attention, runs))
    report = compensate_attention(
        Coupled.of(model, site), [lambda call=call: copied(**call) for call in calls], MacSettings()
    )
    assert report.scores[1] < report.scores[0]
    assert set(report.change) == {"query", "key"} and all(change > 0 for change in report.change.values())
