"""Where the time of every method goes, at one bit-width and one seed.

    python benchmarks/methods.py embedded/sam-nano-256 \
        --images ../shared/data/coco-train100/images --coco ../shared/data/coco-train100/instances.json \
        --eval-images ../shared/data/coco-val50/images --eval-coco ../shared/data/coco-val50/instances.json

Nothing is shared between methods: each row is what ``carsam quantize`` and ``carsam evaluate`` would take. With
``--shared``, units that methods have in common are finished once, as in ``carsam compare``. "Streams" is what the walk
spends between units: their inputs and targets from both models.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import options

import carsam
from carsam.config import CalibrationConfig, QuantizeConfig
from carsam.evaluate.coco_metrics import evaluate_coco
from carsam.methods.base import registry
from carsam.models.family import find_sites
from carsam.prompts.calibration import calibration_set
from carsam.run.context import Hooks

LIMIT_MINUTES = 60
COLUMNS = ("transform", "ranges", "encoder", "decoder", "streams", "pack", "evaluate")


# Which column a piece of work counts to (carsam.run.context.Hooks); units tell their own seconds.
WORK = {
    "transform": "transform",
    "fit weights": "ranges",
    "ranges": "ranges",
    "pack": "pack",
    "write": "pack",
    "verify": "pack",
}


class Watch(Hooks):
    """Adds up the time of every piece of work, and notes which units came from the store."""

    def __init__(self) -> None:
        super().__init__(around=self._timed)
        self.spent: dict[str, float] = defaultdict(float)
        self.restored: set[str] = set()
        # Their reports tell the seconds of the method that finished them.
        self.unit_found = self.restored.add

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if name in WORK:
                self.spent[WORK[name]] += time.perf_counter() - started


def main() -> None:
    parser = options.parser(__doc__)
    options.add_data(parser, measured=True)
    parser.add_argument("--methods", default=",".join(sorted(registry())))
    parser.add_argument("--shared", action="store_true", help="methods share finished units")
    arguments = options.parse(parser)

    model = carsam.load_model(arguments.model)
    sites = find_sites(model)
    started = time.perf_counter()
    images = {"images": arguments.images, "coco": arguments.coco, "n_images": arguments.n_images}
    data = calibration_set(model, **images, seed=arguments.seed)
    print(f"calibration data: {time.perf_counter() - started:.1f} s, read once\n")
    options.head("method", *COLUMNS, "total", "steps/s")
    totals = []
    shared = tempfile.TemporaryDirectory() if arguments.shared else None
    for name in arguments.methods.split(","):
        kind = registry()[name]
        settings = options.steps_of(arguments) if hasattr(kind(), "reconstruction") else {}
        config = QuantizeConfig(name, settings, arguments.bits, calibration=CalibrationConfig(seed=arguments.seed))
        watch = Watch()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            cache = shared.name if shared is not None else None
            result = carsam.quantize(model, data, config, out=Path(folder) / "packed", unit_cache=cache, hooks=watch)
            quantized = time.perf_counter() - started
            evaluate_coco(result.model, arguments.eval_coco, arguments.eval_images)
        total = time.perf_counter() - started
        spent = watch.spent
        units = [unit for unit in result.report.units if unit.unit not in watch.restored]
        for unit in units:
            spent["decoder" if sites.in_decoder(unit.unit) else "encoder"] += unit.seconds
        spent["evaluate"] = total - quantized
        spent["streams"] = quantized - sum(spent[column] for column in COLUMNS if column != "evaluate")
        steps = sum(unit.steps for unit in units)
        rate = f"{steps / (spent['encoder'] + spent['decoder']):.0f}" if steps else ""
        options.row(name, *(f"{seconds:.1f} s" for seconds in (*(spent[column] for column in COLUMNS), total)), rate)
        totals.append(total)
    minutes = sum(totals) / 60
    print(
        f"\n{len(totals)} methods on one subject at {arguments.bits.upper()} and one seed: {minutes:.1f} min; must be "
        f"< {LIMIT_MINUTES}"
    )
    if shared is not None:
        shared.cleanup()


if __name__ == "__main__":
    main()
