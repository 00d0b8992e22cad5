"""The activation cache: what it gave and nobody changed is stored once, whatever it is called."""

import torch

from carsam.calibrate.cache import CacheSpace

CPU = torch.device("cpu")


def test_what_comes_back_as_it_was_given_is_shared():
    space = CacheSpace()
    stage, unit = space.cache(), space.cache()
    exact = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    stage.append({"keys": exact, "positions": torch.ones(3, 4)})
    size = space.in_memory
    given = stage.get(0, CPU)
    unit.append({"image": given["keys"], "positions": given["positions"]})
    assert space.in_memory == size
    for name, other in (("image", "keys"), ("positions", "positions")):
        assert torch.equal(unit.get(0, CPU)[name], stage.get(0, CPU)[other])
    # It lives as long as anybody has it.
    del stage, given
    assert space.in_memory == size and torch.equal(unit.get(0, CPU)["image"], exact.half().float())
    del unit
    assert space.in_memory == 0


def test_what_was_changed_or_made_from_it_is_stored_for_itself():
    space = CacheSpace()
    stage, unit = space.cache(), space.cache()
    stage.append({"keys": torch.zeros(2, 3)})
    size, given = space.in_memory, stage.get(0, CPU)["keys"]
    unit.append({"keys": given + 1})
    assert space.in_memory == 2 * size and torch.equal(unit.get(0, CPU)["keys"], torch.ones(2, 3))
    changed = stage.get(0, CPU)["keys"]
    with torch.no_grad():
        changed[:1] += 2  # expanded over its rows: this changes all of them
    unit.append({"keys": changed})
    assert torch.equal(unit.get(1, CPU)["keys"], torch.full((2, 3), 2.0))
    assert torch.equal(stage.get(0, CPU)["keys"], torch.zeros(2, 3))


def test_another_space_keeps_its_own():
    first, second = CacheSpace(), CacheSpace()
    cache, other = first.cache(), second.cache()
    cache.append({"keys": torch.rand(2, 3)})
    other.append(cache.get(0, CPU))
    assert first.in_memory > 0 and second.in_memory == first.in_memory
