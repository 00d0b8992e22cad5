"""The search for bits: optimal by brute force, Everett's theorem on the way, budgets in words."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carsam.bits.allocation import Budget, BudgetError, Candidate, allocate, interpolated
from carsam.errors import ConfigError

BITS = (3, 4, 6, 8)
ERRORS = st.floats(1e-6, 1e3)


@st.composite
def instances(draw):
    """A few sites whose errors fall with bits, or do not, and a capacity between the least and the most."""
    count = draw(st.integers(1, 5))
    candidates = []
    for index in range(count):
        errors = draw(st.lists(ERRORS, min_size=len(BITS), max_size=len(BITS)))
        if draw(st.booleans()):
            errors = sorted(errors, reverse=True)
        candidates.append(Candidate(f"s{index}", draw(st.integers(1, 40)), dict(zip(BITS, errors))))
    total = sum(candidate.size for candidate in candidates)
    return candidates, draw(st.integers(3 * total, 9 * total))


def brute(candidates, capacity):
    """The least error of all plans that fit."""
    best = math.inf
    for bits in itertools.product(BITS, repeat=len(candidates)):
        if sum(b * c.size for b, c in zip(bits, candidates)) <= capacity:
            best = min(best, math.fsum(c.errors[b] for b, c in zip(bits, candidates)))
    return best


@settings(max_examples=60, deadline=None)
@given(instances())
def test_it_finds_the_best_of_all_plans(instance):
    candidates, capacity = instance
    found = allocate(candidates, capacity)
    assert found.cost == sum(found.bits[c.name] * c.size for c in candidates) <= capacity
    assert found.error == pytest.approx(math.fsum(c.errors[found.bits[c.name]] for c in candidates))
    # The solver's tolerance: a part in a million of the errors' spread.
    spread = max(max(c.errors.values()) for c in candidates)
    assert found.error == pytest.approx(brute(candidates, capacity), rel=1e-9, abs=1e-6 * spread)
    assert found.mean_bits == pytest.approx(found.cost / sum(c.size for c in candidates))


@settings(max_examples=30, deadline=None)
@given(instances(), st.integers(1, 5))
def test_a_larger_budget_is_never_worse(instance, more):
    candidates, capacity = instance
    spread = max(max(c.errors.values()) for c in candidates)
    richer = capacity + more * sum(c.size for c in candidates)
    assert allocate(candidates, richer).error <= allocate(candidates, capacity).error + 1e-6 * spread


def test_many_sites_take_no_time_and_use_the_budget():
    sizes = [10_000 * (1 + i % 7) for i in range(300)]
    candidates = [
        Candidate(str(i), size, {b: (1 + i % 13) * 4.0**-b for b in range(3, 9)}) for i, size in enumerate(sizes)
    ]
    found = allocate(candidates, 4 * sum(sizes))
    assert 3.999 < found.mean_bits <= 4
    even = math.fsum(c.errors[4] for c in candidates)
    assert found.error < 0.9 * even
    # A site that gains more from a bit, and costs no more, has no fewer.
    assert found.bits["12"] >= found.bits["5"] >= found.bits["208"]


def test_a_budget_that_nothing_meets_names_the_least():
    candidates = [Candidate("a", 10, {3: 1.0, 4: 0.5}), Candidate("b", 5, {4: 1.0})]
    with pytest.raises(BudgetError, match="the least costs 50 bits"):
        allocate(candidates, 49)
    assert allocate(candidates, 50).bits == {"a": 3, "b": 4}
    assert allocate(candidates, 10**9).bits == {"a": 4, "b": 4}
    with pytest.raises(ConfigError, match="not finite"):
        allocate([Candidate("a", 1, {3: math.nan})], 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4.0bits", Budget(bits=4.0)),
        (" 4 BITS ", Budget(bits=4.0)),
        ("3.5bit", Budget(bits=3.5)),
        ("6MB", Budget(size=6_000_000)),
        ("5800kB", Budget(size=5_800_000)),
        ("0.5 GB", Budget(size=500_000_000)),
    ],
)
def test_budgets_are_read(text, expected):
    assert Budget.parse(text) == expected
    assert Budget.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "4", "MB", "-4bits", "0bits", "4 bytes", "nanbits", "1e3MB", None])
def test_other_budgets_are_refused(text):
    with pytest.raises(ConfigError, match="cannot read the budget"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["500ms", "0.5 s", "2 seconds"])
def test_a_time_is_refused_since_no_bits_change_it(text):
    with pytest.raises(BudgetError, match=rf"the budget {text} is a time.*takes as long.*4.0bits.*carsam benchmark"):
        Budget.parse(text)


@given(st.dictionaries(st.integers(3, 8), st.floats(1e-9, 1e9), min_size=1))
def test_interpolation_keeps_what_was_measured_and_never_rises(measured):
    found = interpolated(measured)
    values = [found[b] for b in sorted(found)]
    assert values == sorted(values, reverse=True)
    first = min(measured)
    assert found[first] == pytest.approx(min(measured[first], found.get(first - 1, math.inf)))
    assert found[3] == pytest.approx(measured[first] * 4.0 ** (first - 3))


def test_interpolation_between_and_beyond():
    found = interpolated({4: 16.0, 6: 1.0})
    assert found == pytest.approx({3: 64.0, 4: 16.0, 5: 4.0, 6: 1.0, 7: 0.25, 8: 0.0625})


def test_the_solver_writes_nothing_between_the_lines_of_a_command(capfd):
    """HiGHS does for this very problem, past sys.stdout."""
    draw = random.Random(2)
    sizes = (393216, 196608, 49152, 1536, 768, 10752, 32768)
    candidates = [
        Candidate(
            str(i),
            draw.choice(sizes),
            interpolated({b: 10 ** draw.uniform(-6, -2) * 4.0**-b * draw.uniform(0.7, 1.3) for b in (3, 4, 6)}),
        )
        for i in range(126)
    ]
    print("before", flush=True)
    allocate(candidates, 4 * sum(each.size for each in candidates))
    print("after", flush=True)
    assert capfd.readouterr().out == "before\nafter\n"
