"""The activation cache: inputs and targets of a unit for all calibration images, in half precision.

Three things keep ViT-H within a workstation's memory: tensors that repeat over their first dimension (the image
embedding before the first decoder block is the same for every prompt of an image, positional embeddings always are) are
stored once, what a stage hands to a unit in it as it came is not stored again, and beyond a budget tensors lie in
memory-mapped files. On a GPU they stay there while a quarter of its free
memory lasts: each step of a reconstruction reads tens of megabytes, which would cross the bus every time.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from carsam.errors import CarsamError
from carsam.output.files import SPILL, clear_spills

HALF_MAX = torch.finfo(torch.float16).max


class ActivationCache:
    """A list of named tensors per calibration item.

    Args:
        space: Accounting and spill directory, shared by the caches of a run.
    """

    def __init__(self, space: CacheSpace):
        self._space = space
        self._items: list[dict[str, tuple[Tensor, int]]] = []

    def __len__(self) -> int:
        return len(self._items)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of an item's tensors, in order."""
        return tuple(self._items[0])

    def only(self, names: tuple[str, ...]) -> ActivationCache:
        """The same items with some of their tensors, which stay where they are; with no names all of them."""
        if not names:
            return self
        some = ActivationCache(self._space)
        some._items = [{name: item[name] for name in names} for item in self._items]
        return some

    def append(self, tensors: dict[str, Tensor]) -> None:
        """Stores one item's tensors, each (n, ...); what this space's caches gave and nobody changed is shared."""
        self._items.append({name: self._store(value) for name, value in tensors.items()})

    def _store(self, value: Tensor) -> tuple[Tensor, int]:
        kept, version = self._space.given.get(value, (None, None))
        if kept is not None and value._version == version:
            return kept
        value, repeats = value.detach(), value.shape[0]
        if repeats > 1 and torch.equal(value[:1].expand_as(value), value):
            value = value[:1]
        # Saturate instead of overflowing to infinity: one wild activation must not poison a whole unit.
        return self._space.keep(value.clamp(-HALF_MAX, HALF_MAX).to(torch.float16)), repeats

    def get(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """One item in float32 on ``device``."""
        found = {}
        for name, kept in self._items[index].items():
            value, repeats = kept
            found[name] = value.to(device).float().expand(repeats, *value.shape[1:])
            self._space.given[found[name]] = kept, found[name]._version
        return found

    def batch(self, indices: list[int], device: torch.device) -> dict[str, Tensor]:
        """Several items, concatenated along the first dimension."""
        items = [self.get(index, device) for index in indices]
        if len(items) == 1:
            return items[0]
        return {name: torch.cat([item[name] for item in items]) for name in items[0]}


class CacheSpace:
    """Memory budget and spill directory of a run's caches; the directory vanishes with it.

    Args:
        budget: Bytes to keep in memory.
        directory: Parent of the spill directory (system temporary directory if None).
        device: Where the tensors are used; a GPU's memory is filled before this machine's.
    """

    def __init__(self, budget: int = 6 * 2**30, directory: Path | None = None, device: torch.device | None = None):
        clear_spills()
        self.budget = budget
        # What caches gave and somebody still holds: as it is kept, and the tensor's version when it was given.
        self.given = WeakTensorKeyDictionary()
        self._device = device if device is not None and device.type == "cuda" else None
        self._device_budget = torch.cuda.mem_get_info(device)[0] // 4 if self._device is not None else 0
        self._parent = directory
        self._folder: tempfile.TemporaryDirectory | None = None
        self._files = 0
        self._live: list[tuple[object, int]] = []
        self._on_device: list[tuple[object, int]] = []

    def cache(self) -> ActivationCache:
        """A new, empty cache."""
        return ActivationCache(self)

    @property
    def in_memory(self) -> int:
        """Bytes of the tensors that are alive in memory."""
        return _alive(self._live)

    def keep(self, value: Tensor) -> Tensor:
        """A copy of ``value``: on the GPU while there is room, in memory within the budget, in a mapped file beyond it.

        Raises:
            CarsamError: There is no space for the file.
        """
        size = value.numel() * value.element_size()
        if self._device is not None and value.is_cuda and _alive(self._on_device) + size <= self._device_budget:
            kept = value.clone(memory_format=torch.contiguous_format)
            self._on_device.append((weakref.ref(kept), size))
            return kept
        if self.in_memory + size <= self.budget:
            kept = value.to("cpu", copy=True).contiguous()
            self._live.append((weakref.ref(kept), size))
            return kept
        try:
            path = self._reserve(size)
        except OSError as error:
            raise CarsamError(
                f"cannot keep activations in the temporary folder {self._parent or tempfile.gettempdir()}: "
                f"{error.strerror or error}. Free space there, set TMPDIR to another folder, or allow more memory "
                "(--cache-gb)."
            ) from error
        mapped = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
        if os.name == "posix":
            # The mapping keeps the data reachable; without its name, the file goes when the last tensor does.
            path.unlink()
        return mapped.copy_(value.flatten().cpu()).view(value.shape)

    def _reserve(self, size: int) -> Path:
        """A new file of ``size`` bytes in the spill directory."""
        if self._folder is None or not Path(self._folder.name).is_dir():
            prefix = f"{SPILL}{os.getpid()}-"
            self._folder = tempfile.TemporaryDirectory(prefix=prefix, dir=self._parent, ignore_cleanup_errors=True)
        self._files += 1
        path = Path(self._folder.name) / f"{self._files}.bin"
        with path.open("wb") as file:
            # Reserve the space now: a full disk is an error here, but a bus error once the file is mapped.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        return path


def _alive(tensors: list[tuple[object, int]]) -> int:
    """Bytes of those tensors that are alive; the others are forgotten."""
    tensors[:] = [(ref, size) for ref, size in tensors if ref() is not None]
    return sum(size for _, size in tensors)


def cached(space: CacheSpace, items: Iterable[dict[str, torch.Tensor]]) -> ActivationCache:
    """A cache of the items, computed without gradients."""
    cache = space.cache()
    with torch.no_grad():
        for item in items:
            cache.append(item)
    return cache


def variances(cache: ActivationCache) -> list[float]:
    """Variance of every tensor over all items of a cache."""
    names = list(cache.get(0, torch.device("cpu")))
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    for index in range(len(cache)):
        for name, value in cache.get(index, torch.device("cpu")).items():
            parts = [value.sum(dtype=torch.float64), value.double().square().sum(), torch.tensor(value.numel())]
            sums[name] += torch.stack(parts)
    result = []
    for total, square, count in (sums[name].tolist() for name in names):
        result.append(max(square / count - (total / count) ** 2, 1e-12))
    return result
