"""What the masks make of an error in a layer's output: how much each row of it (a token, a place of a map) matters.

A layer's squared error counts all rows alike. The masks do not: they read one of the tokens, and of the image what lies
near the edge of an object. What is far outside has logits of −90 where the object itself reaches +5, so that an error
which is small beside the first can wipe out the second (docs/BEYOND.md).

The masks are the float model's own, so no label is needed. Every mask counts alike, whether its object fills the image
or four pixels: a mask's squared error is taken relative to its energy, as IoU takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from carsam.calibrate.counted import Counted, uncounted
from carsam.errors import ConfigError
from carsam.models.family import DECODER, ENCODED, ENCODER, Part, Stage, Tensors
from carsam.models.forward import encode_image
from carsam.models.sites import Sites
from carsam.prompts.calibration import CalibrationImage, CalibrationSet
from carsam.quantizers.sampling import odd_step_within

# A predicted IoU's error beside that of a mask.
SCORE_SHARE = 0.3
# What float16 holds; only a row that alone moves the masks of dozens of prompts comes near.
LARGEST = 6e4


# Called with a layer's path and the number of a calibration image; weights of the squared errors of the layer's outputs
# there, their shape without channels, or None for all alike.
RowWeights = Callable[[str, int], "Tensor | None"]


def unweighed(layer: str, index: int) -> Tensor | None:
    """All rows alike."""
    return None


def sampled_rows(weights: Tensor, most: int) -> Tensor:
    """Those of the rows that are picked where at most ``most`` of a layer's are looked at, (rows,)."""
    return weights.flatten()[:: odd_step_within(weights.numel(), most)]


@dataclass(frozen=True)
class SensitivitySettings:
    """Where errors are weighed by what the masks make of them: foldings, maps, ranges and the refit.

    Attributes:
        share: Share of a squared error that is weighed; 0 counts all rows alike.
        draws: Random directions an image; each costs a pass backwards.
        encoder: In the image encoder as well, and not in the decoder alone.
    """

    share: float = 0.9
    draws: int = 4
    encoder: bool = False

    def __post_init__(self):
        if not 0 <= self.share <= 1 or self.draws < 1:
            raise ConfigError("the share that the masks weigh must lie in [0, 1], and draws be at least 1.")
        if self.encoder and self.share == 0:
            raise ConfigError("masks.encoder weighs nothing where masks.share is 0; set masks.share=0.9 as well.")


@dataclass
class OutputSensitivity:
    """Weights of the elements of a stage's outputs: positions of every image times channels.

    Attributes:
        channel_dim: Where the channels are.
        positions: Per image and output, 1 in place of the channels, float16; mean 1.
        channels: Per output the sum over images, of the output's dimensions and 1 in place of all but the channels.
    """

    channel_dim: int
    positions: list[Tensors] = field(default_factory=list)
    channels: Tensors = field(default_factory=dict)

    def add(self, squares: Tensors) -> None:
        """Takes what one image's outputs matter, element by element."""
        kept = {}
        for name, square in squares.items():
            place = square.mean(self.channel_dim, keepdim=True)
            kept[name] = _relative(place)
            others = [each for each in range(square.dim()) if each != self.channel_dim % square.dim()]
            channels = square.mean(others, keepdim=True).cpu()
            self.channels[name] = self.channels[name] + channels if name in self.channels else channels
        self.positions.append(kept)

    def batch(self, indices: list[int], device: torch.device) -> list[Tensor]:
        """Weights of some images that lie along the first dimension, in output order."""
        found = []
        for name, channels in self.channels.items():
            places = torch.cat([self.positions[index][name] for index in indices]).to(device).float()
            found.append(places * (channels / channels.mean().clamp(min=1e-30)).to(device))
        return found


@dataclass(frozen=True)
class MaskSensitivity:
    """Weights of the rows of layers' outputs.

    Attributes:
        rows: By layer: per calibration image (batch, ...) float16, the output's shape without its channels; mean 1.
        share: Of a weight that is the masks'.
        outputs: By encoder stage, where the encoder was asked: what its outputs' elements matter.
    """

    rows: dict[str, list[Tensor]]
    share: float = 1.0
    outputs: dict[str, OutputSensitivity] = field(default_factory=dict)

    def weights(self, layer: str, index: int) -> Tensor | None:
        """:data:`RowWeights` of mean 1: those of the masks with their share, 1 otherwise."""
        if layer not in self.rows:
            return None
        return (1 - self.share) + self.share * self.rows[layer][index].float()


def relative_pull(logits: Tensor, scores: Tensor) -> Tensor:
    """A random direction of masks and predicted IoU: its gradient's square is an unbiased diagonal of JᵀJ.

    Args:
        logits: (prompts, masks, h, w).
        scores: (prompts, masks).
    """
    masks = torch.sigmoid(logits)
    energy = masks.detach().square().sum((-2, -1), keepdim=True).clamp(min=1.0)
    # Drawn on the CPU: the same on every device.
    pull = (masks / energy.sqrt() * torch.randn(masks.shape).to(masks.device)).sum()
    return pull + SCORE_SHARE * (scores * torch.randn(scores.shape).to(scores.device)).sum()


@contextmanager
def _outputs(model: nn.Module, layers: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    """While the block runs the model, ``found`` gets the layers' outputs; gradients reach them."""

    def keep(name: str, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        found[name] = output if output.requires_grad else output.detach().requires_grad_()
        return found[name]

    with ExitStack() as stack:
        for name in layers:
            stack.callback(model.get_submodule(name).register_forward_hook(partial(keep, name)).remove)
        yield


class _Passes:
    """One image's way through the float model, forwards stage by stage and back again."""

    def __init__(self, model: nn.Module, sites: Sites, device: torch.device):
        self.model, self.sites, self.device = model, sites, device
        self.family = sites.family
        self.layers = [site.name for site in sites.layers]
        self.is_map = {name: isinstance(model.get_submodule(name), nn.Conv2d) for name in self.layers}
        parts = self.family.parts(sites)
        self.encoder: Part = parts[0]
        self.plain = [part.name for part in parts[1:]] == [DECODER]

    def whole_stages(self) -> dict[str, OutputSensitivity]:
        """The encoder stages that are units of their own and hand on what they give."""
        plain = {stage.name for stage in self.encoder.stages if stage.following is None}
        units = self.family.units(self.sites, ENCODER)
        return {
            unit.stage: OutputSensitivity(unit.channel_dim)
            for unit in units
            if unit.scope == (unit.stage,) and unit.stage in plain
        }

    def of_stage(self, stage: Stage | None) -> list[str]:
        prefix = self.sites.decoder if stage is None else stage.name
        return [name for name in self.layers if name.startswith(prefix + ".")]

    def known(self, index: int, data: CalibrationSet) -> list[Tensors] | None:
        """What the encoder gives on an image, where somebody computed it before."""
        embedding = data.embedding(index)
        return None if embedding is None else [{ENCODED: embedding.to(self.device)}]

    @torch.no_grad()
    def forwards(self, image: CalibrationImage) -> list[Tensors]:
        """The inputs of every encoder stage, and what the last one gives."""
        if not self.encoder.stages:
            return [{ENCODED: encode_image(self.model, image.pixel_values)}]
        found = [self.encoder.enter(self.model, {}, image)]
        for stage in self.encoder.stages:
            found.append(stage.step(self.model, found[-1]))
        return found

    def decoder(
        self, encoded: Tensors, image: CalibrationImage, draws: int, squares: dict[str, Tensor]
    ) -> list[Tensors] | None:
        """Adds squared gradients of the decoder's layers; gradients of what the encoder gave, one for each draw."""
        names, outputs = self.of_stage(None), {}
        with torch.enable_grad(), _outputs(self.model, names, outputs):
            leaves = {name: value.detach().requires_grad_() for name, value in encoded.items()}
            result = self.family.decode(self.model, leaves, image)
            if result is None:
                return None
            pulls = [relative_pull(*result) for _ in range(draws)]
            return [self._gradients(pull, leaves, outputs, squares) for pull in pulls]

    def stage(self, stage: Stage, inputs: Tensors, pulls: list[Tensors], squares: dict[str, Tensor]) -> list[Tensors]:
        """The same of an encoder stage, from the gradients of its outputs."""
        names, outputs = self.of_stage(stage), {}
        with torch.enable_grad(), _outputs(self.model, names, outputs):
            leaves = {
                name: value.detach().requires_grad_() if value.is_floating_point() else value
                for name, value in inputs.items()
            }
            given = stage.step(self.model, leaves)
            result = []
            for pull in pulls:
                total = sum((value * pull[name]).sum() for name, value in given.items() if name in pull)
                result.append(self._gradients(total, leaves, outputs, squares))
            return result

    def _gradients(self, pull: Tensor, leaves: Tensors, outputs: Tensors, squares: dict[str, Tensor]) -> Tensors:
        named = {name: value for name, value in leaves.items() if value.requires_grad}
        wanted = [*outputs.values(), *named.values()]
        found = torch.autograd.grad(pull, wanted, allow_unused=True, retain_graph=True)
        for name, gradient in zip(outputs, found):
            if gradient is not None:
                square = gradient.square().sum(1 if self.is_map[name] else -1)
                squares[name] = squares[name] + square if name in squares else square
        return {name: value for name, value in zip(named, found[len(outputs) :]) if value is not None}


def _relative(squares: Tensor) -> Tensor:
    """Mean 1, as they are kept."""
    return (squares / squares.mean().clamp(min=1e-30)).clamp(max=LARGEST).half().cpu()


def squared(pulls: Sequence[Tensors]) -> Tensors:
    """Σ over draws of squared gradients, by name."""
    return {name: sum(pull[name].square() for pull in pulls) for name in pulls[0]}


@torch.no_grad()
def mask_sensitivity(
    model: nn.Module,
    sites: Sites,
    data: CalibrationSet,
    settings: SensitivitySettings,
    *,
    seed: int = 0,
    counted: Counted = uncounted,
) -> MaskSensitivity | None:
    """How much the masks depend on every row of every layer's output.

    The diagonal of JᵀJ, with J the derivative of the masks (relative to each one's energy) and of predicted IoU, from
    random directions: E[(Jᵀr)²] = diag(JᵀJ) for r of independent standard normals, summed over a row's channels. BRECQ
    weighs by the squared gradient of the task's loss (ICLR 2021, equation 10); there is no label here.

    Args:
        model: The float model.
        sites: The sites to treat.
        data: Calibration images; where their embeddings are known, the encoder does not run.
        settings: Of it.
        seed: Of the directions.
        counted: Given the images.

    Returns:
        None where a family's masks cannot be differentiated.
    """
    passes = _Passes(model, sites, next(model.parameters()).device)
    if not passes.plain:
        return None
    rows: dict[str, list[Tensor]] = {}
    outputs = passes.whole_stages()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, image in enumerate(counted(data.images)):
            squares: dict[str, Tensor] = {}
            inputs = passes.known(index, data) if not settings.encoder else None
            inputs = inputs or passes.forwards(image)
            pulls = passes.decoder(inputs[-1], image, settings.draws, squares)
            if pulls is None:
                return None
            if settings.encoder:
                for stage, before in zip(reversed(passes.encoder.stages), reversed(inputs[:-1])):
                    if stage.name in outputs:
                        outputs[stage.name].add(squared(pulls))
                    pulls = passes.stage(stage, before, pulls, squares)
            for name, square in squares.items():
                rows.setdefault(name, []).append(_relative(square))
    # What is not reached by every image has no weights: a part of a family's own.
    everywhere = {name: found for name, found in rows.items() if len(found) == len(data.images)}
    return MaskSensitivity(everywhere, settings.share, outputs if settings.encoder else {})
