"""Bits for every site under a budget: the least summed error whose cost fits. Pure search, without a model.

Errors of sites add up well enough to compare plans: each is small, and of a site alone. For a price λ of a bit every
site chooses for itself the bits with the least error + λ · cost. A plan found so is the best of all that cost no more
than it does (Everett, 1963), and λ is found by bisection. Between two such plans lie others that use the budget better;
what the bound of the Lagrangian cannot rule out there is settled by integer programming (HiGHS).
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import numpy as np

from carsam.errors import ConfigError

# What the search mixes: two bits lose more than any other site can give back, beyond eight nothing is lost.
MIXED_BITS = tuple(range(3, 9))
_BISECTIONS = 100
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
_TIMES = ("ms", "s", "sec", "seconds")


class BudgetError(ConfigError):
    """A budget that no plan meets, with the nearest that one does."""


@dataclass(frozen=True)
class Budget:
    """What a plan may cost.

    Attributes:
        bits: Mean bits of a weight, and of an activation; None where the size of the file is what counts.
        size: Bytes of the file of weights; None where mean bits are.
    """

    bits: float | None = None
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads ``4.0bits``, ``6MB``, ``5800kB``.

        Raises:
            ConfigError: The text is neither.
            BudgetError: It is a time, which no choice of bits changes.
        """
        time = re.fullmatch(rf"\s*[0-9.]{{1,20}}\s*({'|'.join(_TIMES)})\s*", str(text).lower())
        if time is not None:
            raise BudgetError(
                f"the budget {str(text).strip()} is a time, and no choice of bits changes the time: runtimes compute "
                "with bytes, so a model of 3 bits takes as long as one of 8 (docs/RESULTS.md, 16). Write mean bits as "
                "4.0bits, or the size of the weights as 6MB; carsam benchmark measures how long a model takes."
            )
        match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(bits?|kb|mb|gb)\s*", str(text).lower())
        if match is None or float(match[1]) == 0:
            raise ConfigError(
                f"cannot read the budget {text!r}; write mean bits as 4.0bits, or the size of the weights as 6MB."
            )
        value, unit = float(match[1]), match[2]
        return cls(bits=value) if unit.startswith("bit") else cls(size=round(value * _BYTES[unit]))

    def __str__(self) -> str:
        return f"{self.bits:g}bits" if self.bits is not None else f"{self.size / 1e6:g}MB"


def check_budget(budget: Budget) -> None:
    """Refuses what no model could meet, before anything is measured.

    Raises:
        BudgetError: With the nearest budget that can be met.
    """
    if budget.bits is not None and budget.bits < MIXED_BITS[0]:
        raise BudgetError(
            f"a mean of {budget.bits:g} bits cannot be met: the bits that are mixed are {MIXED_BITS[0]} to "
            f"{MIXED_BITS[-1]}. The nearest budget that can be met is {MIXED_BITS[0]}bits."
        )


@dataclass(frozen=True)
class Candidate:
    """A site whose bits are to be chosen.

    Attributes:
        name: Of the weights (a layer's path), or of an activation site.
        size: Numbers that each bit is paid for: weights, or elements of the activation.
        errors: Error of the site alone by bits.
    """

    name: str
    size: int
    errors: Mapping[int, float]


@dataclass(frozen=True)
class Allocation:
    """A plan.

    Attributes:
        bits: By name.
        error: Sum of the sites' errors.
        cost: Σ size · bits.
        mean_bits: Cost over the sum of sizes.
    """

    bits: dict[str, int]
    error: float
    cost: int
    mean_bits: float


def allocate(candidates: Sequence[Candidate], capacity: int) -> Allocation:
    """The bits with the least summed error whose cost Σ size · bits is at most ``capacity``.

    Args:
        candidates: Sites; each has errors for at least one number of bits.
        capacity: In bits.

    Raises:
        BudgetError: Even the least bits of every site cost more; ``nearest`` capacity in the message, in bits.
    """
    options = [_options(candidate) for candidate in candidates]
    least = sum(min(cost for _, cost, _ in each) for each in options)
    if least > capacity:
        raise BudgetError(f"no plan costs {capacity} bits or less; the least costs {least} bits.")
    low, high = _bisect(options, capacity)
    bound, price = low
    chosen = _settle(options, capacity, bound, price, high)
    picked = [each[index] for each, index in zip(options, chosen)]
    cost, total = sum(cost for _, cost, _ in picked), sum(candidate.size for candidate in candidates)
    return Allocation(
        {candidate.name: bits for candidate, (bits, _, _) in zip(candidates, picked)},
        math.fsum(error for _, _, error in picked),
        cost,
        cost / max(total, 1),
    )


_Option = tuple[int, int, float]  # bits, cost, error


def _options(candidate: Candidate) -> list[_Option]:
    """Bits in order of cost, without those that another one beats in cost and error both."""
    kept: list[_Option] = []
    for bits in sorted(candidate.errors):
        error = float(candidate.errors[bits])
        if not math.isfinite(error):
            raise ConfigError(f"the error of {candidate.name} at {bits} bits is not finite; it cannot be weighed.")
        if not kept or error < kept[-1][2]:
            kept.append((bits, bits * candidate.size, error))
    assert kept, f"{candidate.name} has no bits to choose from"
    return kept


def _greedy(options: list[list[_Option]], price: float) -> list[int]:
    """What every site chooses at a price of a bit; of equals the cheapest."""
    return [min(range(len(each)), key=lambda i, each=each: each[i][2] + price * each[i][1]) for each in options]


def _totals(options: list[list[_Option]], chosen: Sequence[int]) -> tuple[int, float]:
    picked = [each[index] for each, index in zip(options, chosen)]
    return sum(cost for _, cost, _ in picked), math.fsum(error for _, _, error in picked)


def _bisect(options: list[list[_Option]], capacity: int) -> tuple[tuple[float, float], list[int]]:
    """``((lower bound, its price), plan)``: the Lagrangian's best bound, and the best plan that fits on the way."""

    def bound(chosen: list[int], price: float) -> float:
        cost, error = _totals(options, chosen)
        return error + price * (cost - capacity)

    free = _greedy(options, 0.0)
    if _totals(options, free)[0] <= capacity:
        return (bound(free, 0.0), 0.0), free
    low, high = 0.0, 1.0
    largest = max(error for each in options for _, _, error in each)
    high = max(largest, 1e-300)  # a bit costs more than all that it could win: every site takes its least
    best = bound(free, 0.0), 0.0
    fits = [0] * len(options)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = _greedy(options, middle)
        best = max(best, (bound(chosen, middle), middle))
        if _totals(options, chosen)[0] <= capacity:
            fits, high = chosen, middle
        else:
            low = middle
    return best, fits


def _settle(options: list[list[_Option]], capacity: int, bound: float, price: float, fits: list[int]) -> list[int]:
    """The best plan: among the choices that the Lagrangian's bound leaves open, by integer programming."""
    _, upper = _totals(options, fits)
    gap = upper - bound
    if gap <= 1e-12 * max(upper, 1e-300):
        return fits
    opened = []
    for each in options:
        reduced = [error + price * cost for _, cost, error in each]
        least = min(reduced)
        opened.append([i for i, value in enumerate(reduced) if value - least <= gap * (1 + 1e-9)])
    found = _programme(options, opened, capacity)
    if found is None:
        return fits
    cost, error = _totals(options, found)
    return found if cost <= capacity and error < upper else fits


def _programme(options: list[list[_Option]], opened: list[list[int]], capacity: int) -> list[int] | None:
    """One of the open choices for every site: least error within the capacity."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes most of a second to import
    from scipy.sparse import csr_array

    places = [(site, index) for site, indices in enumerate(opened) for index in indices]
    costs = np.array([options[site][index][1] for site, index in places], dtype=np.int64)
    errors = np.array([options[site][index][2] for site, index in places])
    # Whole numbers of the smallest unit there is, and errors around 1: what the solver's tolerances are made for.
    unit = reduce(math.gcd, (int(cost) for cost in costs)) or 1
    spread = max(float(errors.max() - errors.min()), 1e-300)
    one_each = csr_array(
        (np.ones(len(places)), ([site for site, _ in places], range(len(places)))), shape=(len(opened), len(places))
    )
    with _output_closed():
        result = milp(
            1e3 * errors / spread,
            integrality=np.ones(len(places)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint((costs // unit)[None].astype(float), -np.inf, capacity // unit),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": 20.0},
        )
    if result.x is None:
        return None
    chosen = {site: index for (site, index), value in zip(places, result.x) if value > 0.5}
    return [chosen[site] for site in range(len(opened))] if len(chosen) == len(opened) else None


@contextmanager
def _output_closed() -> Iterator[None]:
    """While the block runs (a fraction of a second), what is written to the process's standard output is lost.

    HiGHS writes lines of its own there whatever it is told, past ``sys.stdout``, between those of a command.
    """
    try:
        kept = os.dup(1)
    except OSError:  # closed already
        yield
        return
    try:
        sys.stdout.flush()
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def interpolated(measured: Mapping[int, float], bits: Sequence[int] = MIXED_BITS) -> dict[int, float]:
    """Errors at all ``bits`` from some that were measured: between two by their ratio, beyond them by 4 for a bit.

    A step half as large has a quarter of the squared error; that is also how far beyond the measured ends is trusted.
    More bits never count as worse: what measurement noise says otherwise is levelled.

    Args:
        measured: Squared error by bits, at least one.
        bits: Wanted.
    """
    assert measured, "nothing was measured"
    known = sorted(measured)
    values: dict[int, float] = {}
    for wanted in sorted(bits):
        below = [b for b in known if b <= wanted]
        above = [b for b in known if b >= wanted]
        if below and above:
            a, b = below[-1], above[0]
            share = 0.0 if a == b else (wanted - a) / (b - a)
            first, last = (max(measured[each], 1e-30) for each in (a, b))
            value = first ** (1 - share) * last**share
        elif below:
            value = measured[below[-1]] * 4.0 ** (below[-1] - wanted)
        else:
            value = measured[above[0]] * 4.0 ** (above[0] - wanted)
        values[wanted] = value
    least = math.inf
    for wanted in sorted(values):
        least = min(least, values[wanted])
        values[wanted] = least
    return values
