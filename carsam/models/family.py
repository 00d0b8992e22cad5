"""The family contract: all that carsam must be told of a kind of model, and the registry that finds the families.

A family is one folder, ``carsam/models/<family>/``, whose ``family.py`` defines a subclass of :class:`Family`. Module
names, forward order, checkpoint formats and the geometry of its inputs are known there and nowhere else. The rest of
carsam asks :func:`family_of` a model and works on what the family says of it:

=====================  ==============================================================================
hook                   says
=====================  ==============================================================================
``sites``              what is quantized: layers, attentions, and what they feed
``parts``              the order of computation: stages from named tensors to named tensors
``units``              what is reconstructed as one, by granularity
``with_matmul``        the attention with quantizers at the inputs of its MatMuls
``load``, ``from_state``, ``find_state``   a model from a folder or a checkpoint file
``encode_image``, ``predict_logits``       image to embeddings, prompts to masks
``halves``             the same as two modules of tensors alone, for export
``image_size``, ``low_res_size``           the geometry of input and masks
``track``              follows objects through a video, where the family has a memory
=====================  ==============================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from carsam.errors import CheckpointError, ConfigError
from carsam.models.names import Names
from carsam.models.rotation import Rotation
from carsam.models.sites import Sites
from carsam.plugins import named_subclasses

if TYPE_CHECKING:
    from carsam.models.attention import MatMulQuantizers
    from carsam.models.tracking import Frames, Tracker
    from carsam.prompts.calibration import CalibrationImage, CalibrationSet
    from carsam.reconstruct.units import Unit

Tensors = dict[str, Tensor]
ENCODER, DECODER = "encoder", "decoder"
# Name of the image embeddings (1, C, h, w) among the tensors that the encoder's part gives to the decoder's.
ENCODED = "hidden_states"
GRANULARITIES = ("module", "pair", "block", "decoder")


@dataclass(frozen=True)
class Stage:
    """A step of the computation, from named tensors to named tensors; units lie within one.

    Attributes:
        name: Module path.
        run: Called as ``run(model, inputs)``; gives the outputs that the rest of the network reads.
        following: Called as ``following(model, inputs, outputs)``; gives the inputs of the next stage of the part. None
            where the outputs are these.
    """

    name: str
    run: Callable[[nn.Module, Tensors], Tensors]
    following: Callable[[nn.Module, Tensors, Tensors], Tensors] | None = None

    def step(self, model: nn.Module, inputs: Tensors) -> Tensors:
        """The inputs of the next stage of the part, or what the last one gives; gradients pass."""
        outputs = self.run(model, inputs)
        return outputs if self.following is None else self.following(model, inputs, outputs)


@dataclass(frozen=True)
class Part:
    """Stages that run one after the other, once for every item.

    Attributes:
        name: ``encoder``, ``decoder``, or what else there is.
        enter: Called as ``enter(model, before, image)`` with the outputs of the part before (empty for the first) and a
            calibration image with its prompts; gives the inputs of the first stage.
        stages: In execution order.
    """

    name: str
    enter: Callable[[nn.Module, Tensors, CalibrationImage], Tensors]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Halves:
    """A model as two modules of tensors alone, for export. Attention and layers are the model's own.

    Attributes:
        encoder: Called with preprocessed pixels (1, 3, S, S); gives a tuple of tensors.
        decoder: Called with these, and then points (B, N, 2) in pixels of the input frame, labels (B, N) float (1
            inside, 0 outside, 2 and 3 corners of a box, -1 no point, -10 nothing at all), mask logits (1 or B, 1, h, w)
            and whether to read them (1,) float; gives the logits of all masks (B, M, h, w), the single one first, and
            their predicted IoU (B, M).
        names: Of the tensors in between.
    """

    encoder: nn.Module
    decoder: nn.Module
    names: tuple[str, ...]


class Family(ABC):
    """One kind of model.

    Attributes:
        name: Of the folder.
        names: How its modules are called for people, and what ``model_type`` in ``config.json`` may say.
        onnx_files: What transformers.js calls the files of encoder and decoder; empty where it has no such model.
        model_class: transformers' class, or one derived from it; the most specific one that a model is an instance of
            decides its family.
        stretched: Whether an image is stretched to the square input; otherwise its longest side fits, and zeros fill
            the rest.
    """

    name: ClassVar[str] = ""
    names: ClassVar[Names] = Names()
    stretched: ClassVar[bool] = False

    @property
    @abstractmethod
    def model_class(self) -> type[PreTrainedModel]:
        """The class of its models."""

    # What is quantized, and in which order it runs.

    @abstractmethod
    def sites(self, model: nn.Module) -> Sites:
        """The sites of a model, float or quantized.

        Raises:
            CheckpointError: It is not laid out as this family's models are.
        """

    @abstractmethod
    def parts(self, sites: Sites, granularity: str = "module") -> tuple[Part, ...]:
        """The order of computation; with the granularity ``decoder`` the decoder is one stage."""

    @abstractmethod
    def units(self, sites: Sites, part: str, granularity: str = "module") -> list[Unit]:
        """The units of a part, in execution order.

        Args:
            sites: The model's sites.
            part: ``encoder`` or ``decoder``, or another part of :meth:`parts`.
            granularity: Of the decoder: ``module`` (each attention, each MLP), ``pair`` (JCAR: token→image attention,
                MLP and image→token attention of a block as one), ``block`` (self-attention too) or ``decoder``.
        """

    def calibration_data(self, model: nn.Module, data: CalibrationSet) -> CalibrationSet:
        """The calibration set as this family needs it: the same, or its images as clips where there is a memory.

        Args:
            model: The float model.
            data: What the user gave.
        """
        return data

    def with_matmul(self, attention: nn.Module, matmul: MatMulQuantizers) -> nn.Module:
        """The attention with quantizers at the inputs of its MatMuls: itself, or another module for its place."""
        from carsam.models.attention import attach_matmul_quantizers

        attach_matmul_quantizers(attention, matmul)
        return attention

    def compute_in_pieces(self, model: nn.Module) -> None:
        """Replaces, in place, what makes huge temporaries in a float model by what gives the same piece by piece."""
        return None

    def integer_module(self, module: nn.Module) -> nn.Module | None:
        """The form in which a module whose Linears run on integers does so as a whole; None where there is none.

        Args:
            module: Any module of a model, its Linears already :class:`carsam.runtime.linear.IntegerLinear`.
        """
        return None

    def adapt(self, model: nn.Module) -> None:
        """Called once a model's layers are quantized or packed: replaces modules that look into their layers' weights.

        A packed layer's ``weight`` holds bytes. Where a module of transformers casts what it gives a layer to the kind
        of numbers of that layer's weight, it would cast to bytes.
        """
        return

    def valid_queries(self, stage: nn.Module, inputs: Tensors) -> Tensor | None:
        """Which queries of a stage's attention are of the image and not padding, (windows, queries); None for all.

        Args:
            stage: The stage's module.
            inputs: What it is called with.
        """
        return None

    # Where models come from.

    @property
    @abstractmethod
    def published_anchor(self) -> str:
        """A tensor by which a checkpoint as published is known, by its names there."""

    def find_state(self, content: object, source: str) -> Mapping[str, Tensor] | None:
        """The tensors of a published checkpoint of this family in a file's content; None where there are none.

        Args:
            content: What the file holds.
            source: What messages call it.
        """
        from carsam.models.files.state import find_state

        return find_state(content, self.published_anchor, source)

    @abstractmethod
    def from_state(self, state: Mapping[str, Tensor], source: str, image_size: int | None = None) -> PreTrainedModel:
        """The model with these tensors, its architecture read from their shapes.

        Args:
            state: From :meth:`find_state`.
            source: What errors call it.
            image_size: Side of the input in pixels where the user asks for one.

        Raises:
            CheckpointError: Tensors are missing, left over, or do not fit together or the image size.
        """

    @abstractmethod
    def check_declared(
        self, config: Mapping[str, Any], shapes: Mapping[str, Any], source: str, *, weights_per_element: float = 1
    ) -> None:
        """Refuses a ``config.json`` that declares more, or other, than its weights hold, before anything is built.

        Args:
            config: The mapping.
            shapes: Shape of every tensor in the weights, by the names of ``model_class``.
            source: What errors call the model.
            weights_per_element: How many weights one stored element can hold (8 for the bytes of a packed model).

        Raises:
            CheckpointError: They do not fit.
        """

    def too_large(self, config: PreTrainedConfig, layers: Sequence[str]) -> str:
        """What makes a configuration one that would take for ever to build; empty where nothing does.

        Args:
            config: Of a packed model, as transformers read it.
            layers: Module paths that the packed model's layout names.
        """
        return ""

    @property
    @abstractmethod
    def anchor(self) -> str:
        """A tensor, by the names of ``model_class``, that every model of the family has and no quantization changes."""

    def foreign(self, content: object) -> str | None:
        """What a file's content is, if the family knows it for something that carsam does not read."""
        return None

    # How it is used.

    @abstractmethod
    def image_size(self, model: nn.Module) -> int:
        """Side of the square input in pixels."""

    @abstractmethod
    def low_res_size(self, model: nn.Module) -> int:
        """Side of the masks that the decoder gives, in pixels."""

    @abstractmethod
    def encode_image(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Image embeddings of preprocessed images ``(B, 3, S, S)``."""

    def embedding_module(self, model: nn.Module) -> nn.Module:
        """The module whose tensors, modules and ``config`` decide the image embeddings of given pixels.

        The whole model unless a family knows better; embeddings are shared by all models that agree in it.
        """
        return model

    @abstractmethod
    def predict_logits(self, model: nn.Module, image_embeddings: Tensor, **prompts: Any) -> tuple[Tensor, Tensor]:
        """Low-resolution logits and predicted IoU of prompts; see :func:`carsam.models.forward.predict_logits`."""

    # Whether a box of two corners is followed by a point that is none, as SAM 2's is.
    box_ends_in_no_point: ClassVar[bool] = False

    def chosen_masks(
        self, model: nn.Module, logits: Tensor, iou: Tensor, multimask_output: bool
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`predict_logits` gives, of all the masks that a decoder of :meth:`halves` gives.

        Args:
            model: The model.
            logits, iou: (B, M, h, w) and (B, M), the single mask first.
            multimask_output: The others instead of it.
        """
        shown = slice(1, None) if multimask_output else slice(0, 1)
        return logits[:, shown], iou[:, shown]

    def halves(self, model: nn.Module) -> Halves:
        """The model in two halves for export.

        Raises:
            ConfigError: Models of this family cannot be exported.
        """
        raise ConfigError(f"{type(model).__name__} cannot be exported yet; its family ({self.name}) gives no halves.")

    @abstractmethod
    def forward(self, model: nn.Module, image: CalibrationImage) -> None:
        """One pass of the whole model over a calibration image with all its prompts; for observers."""

    def decode(self, model: nn.Module, encoded: Tensors, image: CalibrationImage) -> tuple[Tensor, Tensor] | None:
        """Low-resolution logits (prompts, masks, h, w) and predicted IoU (prompts, masks) of an image's boxes.

        Gradients pass, and prompts lie along the first dimension of everything inside, as in the decoder's stages.

        Args:
            model: The model, float or quantized.
            encoded: What the encoder part gives of the image.
            image: The image's prompts.

        Returns:
            None where the family has no such pass; methods that tune on masks are refused for it then.
        """
        return None

    def track(self, model: nn.Module, frames: Frames) -> Tracker:
        """Begins to follow objects through a video.

        Args:
            model: The model, float or quantized.
            frames: The video in the model's input frame.

        Raises:
            CheckpointError: Models of this family know images only.
        """
        raise CheckpointError(
            f"{type(model).__name__} segments images and has no memory to follow objects with; videos need a model "
            "that has, such as SAM 2 (facebook/sam2.1-hiera-tiny)."
        )

    def rotations(self, call: Mapping[str, Any]) -> tuple[Rotation, Rotation]:
        """How queries and keys of an attention with ``rotary`` are turned between projection and MatMul.

        Args:
            call: Arguments of the attention.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attention that turns queries and keys.")

    @abstractmethod
    def as_segment_anything(self, model: nn.Module) -> nn.Module:
        """The model with the interface of ``segment_anything.modeling.Sam``; ``sam_model`` is the model itself."""

    # How it is told apart.

    @abstractmethod
    def architecture(self, model: nn.Module) -> dict[str, Any]:
        """Settings of the configuration that tell two architectures apart although all shapes are equal."""

    @property
    @abstractmethod
    def untouched(self) -> tuple[str, ...]:
        """Tensors that stay in floating point and are changed by no method: they tell which model a packed one is of.

        By the names of ``model_class``.
        """

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


def families() -> dict[str, Family]:
    """All families by name: every folder here with a ``family.py``, and whatever subclasses were imported.

    Raises:
        ConfigError: Two of them have one name.
    """
    classes = named_subclasses(Family, "name", "carsam.models", what="family definition", module="family")
    return {name: cls() for name, cls in classes.items()}


def family_of(model: nn.Module) -> Family:
    """The family of a model: the one with the most specific class that the model is an instance of.

    Raises:
        CheckpointError: carsam knows no such model.
    """
    order = type(model).__mro__
    known = [family for family in families().values() if family.model_class in order]
    if not known:
        raise CheckpointError(f"{type(model).__name__} is not supported; carsam quantizes {supported_classes()}.")
    return min(known, key=lambda family: order.index(family.model_class))


def family_of_type(model_type: object) -> Family | None:
    """The family of a ``config.json`` with this ``model_type``; None where carsam has none."""
    return next((family for family in families().values() if model_type in family.names.model_types), None)


def supported_classes() -> str:
    """The model classes that carsam knows, for messages."""
    return " and ".join(sorted(family.model_class.__name__ for family in families().values()))


def find_sites(model: nn.Module) -> Sites:
    """The sites of a model.

    Raises:
        CheckpointError: No family knows the model, or it is not laid out as its family's are.
    """
    return family_of(model).sites(model)
