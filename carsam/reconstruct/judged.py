"""Learning on some images while others judge: the loop of all that is tuned once a model's integers are settled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from carsam.quantizers import simulate

# Every fourth image judges what the others teach.
HELD_OUT = 4


@dataclass
class Judged:
    """How it went.

    Attributes:
        before, after: Mean loss of the images that judge.
        best: Step whose values are kept; 0 where every change was for the worse.
    """

    before: float
    after: float
    best: int


def split(images: int) -> tuple[list[int], list[int]]:
    """Numbers of the images that teach, and of those that judge; all are both where there are too few."""
    judges = [i for i in range(images) if i % HELD_OUT == HELD_OUT - 1] or list(range(images))
    return [i for i in range(images) if i not in judges] or judges, judges


def learn(
    groups: list[dict[str, Any]],
    loss: Callable[[int], Tensor],
    draw: Callable[[], int],
    judges: list[int],
    *,
    steps: int,
    points: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Judged:
    """Adam along a cosine, everything quantized; the best values by the judges' loss are kept, the first among them.

    Args:
        groups: Adam's groups of parameters with their rates.
        loss: Of an image, by its number.
        draw: Gives the image of the next step; its randomness follows ``seed``.
        judges: Images that judge.
        steps: Steps of one image each.
        points: How often along the way they judge.
        seed: Of the order of images.
        progress: Called with the number of steps done.
    """
    groups = [group for group in groups if group["params"]]
    learned: list[nn.Parameter] = [each for group in groups for each in group["params"]]

    @torch.no_grad()
    def judged() -> float:
        return sum(loss(index).item() for index in judges) / len(judges)

    with torch.random.fork_rng(devices=[]), simulate(weights=True, activations=True, drop=0.0):
        torch.manual_seed(seed)
        before = least = judged()
        kept, best = [each.detach().clone() for each in learned], 0
        optimiser = torch.optim.Adam(groups) if groups else None
        rates = [group["lr"] for group in groups]
        for step in range(steps if groups else 0):
            index = draw()
            for group, rate in zip(optimiser.param_groups, rates):
                group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * step / steps))
            optimiser.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss(index).backward()
            optimiser.step()
            if (step + 1) % max(1, steps // points) == 0 or step + 1 == steps:
                now = judged()
                if now < least:
                    least, kept, best = now, [each.detach().clone() for each in learned], step + 1
            if progress is not None:
                progress(step + 1)
        with torch.no_grad():
            for parameter, value in zip(learned, kept):
                parameter.copy_(value)
    return Judged(before, least, best)
