"""200 damaged and hostile files of every kind; 2,000 with ``-m slow`` or ``python -m benchmarks.fuzz``."""

import copy
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from harness import Case, Runner, plan
from mutations import json_text, mutate_bytes, mutate_json

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

COUNT = 200


@pytest.fixture(scope="session")
def shares():
    """Of the kinds, in percent."""
    from kinds import KINDS

    return {kind: share for kind, (_, share) in KINDS.items()}


def faults(packed, cases):
    """What is neither a success nor an error for people, with how to run it again; and how the others ended."""
    with Runner(packed) as runner:
        outcomes = list(runner.run(cases))
    found = [f"{each.case.command}\n{each.text}" for each in outcomes if each.outcome == "fault"]
    return found, Counter((each.case.kind, each.outcome) for each in outcomes)


def test_a_sample_of_every_kind(packed_folder, shares):
    found, counts = faults(packed_folder, plan(COUNT, shares))
    assert not found, "\n\n".join(found)
    assert sum(counts.values()) == pytest.approx(COUNT, abs=8)
    # A harness whose inputs are all refused at the first check would find nothing.
    for kind in shares:
        assert counts[kind, "read"] and counts[kind, "refused"], (kind, counts)


@pytest.mark.slow
def test_two_thousand(packed_folder, shares):
    found, _ = faults(packed_folder, plan(2000, shares))
    assert not found, "\n\n".join(found)


def test_what_the_harness_must_notice(packed_folder):
    """A foreign exception, a hang, memory without bound, a word on the standard output, a process that ends."""
    cases = [Case(f"self-test: {name}", 0) for name in ("raises", "hangs", "grows", "prints", "ends", "refuses")]
    with Runner(packed_folder, seconds=1.0, megabytes=500, warm=False) as runner:
        raises, hangs, grows, prints, ends, refuses = runner.run(cases)
    assert raises.outcome == "fault" and "KeyError: 'x'" in raises.text
    assert hangs.outcome == "fault" and "took more than 2 s" in hangs.text
    assert grows.outcome == "fault" and "MemoryError" in grows.text
    assert prints.outcome == "fault" and "printed b'hello" in prints.text
    assert ends.outcome == "fault" and "ended the process" in ends.text
    assert (refuses.outcome, refuses.text) == ("refused", "told in words")


def test_the_same_seed_gives_the_same_input():
    value = {"a": [1, 2.5, {"b": "x"}], "c": [[1, 2, 3, 4]] * 3}
    kept = copy.deepcopy(value)
    texts = [json_text(mutate_json(random.Random(f"0/{i}"), value)) for i in range(50)]
    assert texts == [json_text(mutate_json(random.Random(f"0/{i}"), value)) for i in range(50)]
    assert len(set(texts)) > 40 and value == kept
    data = bytes(range(256))
    assert len({mutate_bytes(random.Random(i), data) for i in range(50)}) > 40
