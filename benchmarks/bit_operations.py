"""What bits a packed model really computes with: means over weights, over activations, and over its products.

    python benchmarks/bit_operations.py PACKED [PACKED ...]

A mean over activations counts elements; a site that few elements pass may have many bits for nearly nothing, though its
elements are multiplied as often as any. Bit operations (products times the bits of both factors) say what such a plan
would cost where time follows the bits. One image of noise with as many boxes as calibration has; layers that stay in
floating point count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import options
import torch
from torch import Tensor, nn

import carsam
from carsam.models.attention import MatMulQuantizers
from carsam.models.family import family_of
from carsam.models.forward import encode_image, predict_logits
from carsam.pack.layers import PackedLayer

# What bit operations are relative to: a model with 4 bits everywhere.
EVERYWHERE = 4


@dataclass
class Products:
    """Multiply-accumulates of a model by the bits of their factors."""

    macs: dict[tuple[int, int], int] = field(default_factory=dict)
    elements: dict[int, int] = field(default_factory=dict)

    def add(self, macs: int, first: int, second: int) -> None:
        self.macs[first, second] = self.macs.get((first, second), 0) + macs

    def see(self, elements: int, bits: int) -> None:
        self.elements[bits] = self.elements.get(bits, 0) + elements

    @property
    def relative(self) -> float:
        """Bit operations, as a share of those with 4 bits everywhere."""
        return sum(macs * a * b for (a, b), macs in self.macs.items()) / (EVERYWHERE**2 * sum(self.macs.values()))

    @property
    def mean(self) -> float:
        """Mean bits of an activation."""
        return sum(bits * count for bits, count in self.elements.items()) / sum(self.elements.values())

    @property
    def beyond(self) -> float:
        """Share of the products that have a factor of more than 4 bits."""
        return sum(n for bits, n in self.macs.items() if max(bits) > EVERYWHERE) / sum(self.macs.values())


def watch_layer(found: Products, layer: PackedLayer) -> Callable[..., None]:
    """Counts a layer's products when it runs."""

    def seen(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        bits = layer.input_quantizer.bits
        found.add(out.numel() * torch.Size(layer.shape[1:]).numel(), layer.weight_bits, bits)
        found.see(args[0].numel(), bits)

    return seen


def watch_attention(found: Products, matmul: MatMulQuantizers) -> None:
    """Counts both products of an attention when its keys have come."""
    sizes: dict[str, torch.Size] = {}

    def seen(which: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            sizes[which] = out.shape
            found.see(out.numel(), getattr(matmul, which).bits)
            if which == "value":
                scores = sizes["query"][:-1].numel() * sizes["key"][-2]
                found.add(scores * out.shape[-1], matmul.query.bits, matmul.key.bits)
                found.add(scores * out.shape[-1], matmul.probs.bits, matmul.value.bits)
                found.see(scores, matmul.probs.bits)

        return hook

    for which in ("query", "key", "value"):
        getattr(matmul, which).register_forward_hook(seen(which))


@torch.no_grad()
def products_of(model: nn.Module, boxes: int) -> Products:
    """Products of one image with some boxes."""
    found = Products()
    for module in model.modules():
        if isinstance(module, PackedLayer) and module.weight_bits < 16 and module.input_quantizer.bits < 16:
            module.register_forward_hook(watch_layer(found, module))
        elif isinstance(module, MatMulQuantizers) and max(module.query.bits, module.probs.bits) < 16:
            watch_attention(found, module)
    side = family_of(model).image_size(model)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(boxes, 2, 2, generator=generator).sort(dim=1).values * (side - 1)
    image = torch.randn(1, 3, side, side, generator=generator)
    predict_logits(model, encode_image(model, image), boxes=corners.flatten(1))
    return found


def main() -> None:
    made = options.parser(__doc__)
    made.add_argument("packed", nargs="+", help="packed folders")
    made.add_argument("--boxes", type=int, default=6)
    arguments = options.parse(made)
    options.head("model", "bits of a weight", "of an activation", "products beyond 4 bits", "bit operations to W4A4")
    for folder in arguments.packed:
        model = carsam.load(folder)
        layers = [m for m in model.modules() if isinstance(m, PackedLayer) and m.weight_bits < 16]
        sizes = [torch.Size(layer.shape).numel() for layer in layers]
        weights = sum(n * layer.weight_bits for n, layer in zip(sizes, layers)) / sum(sizes)
        found = products_of(model, arguments.boxes)
        options.row(
            folder, f"{weights:.2f}", f"{found.mean:.2f}", f"{100 * found.beyond:.0f} %", f"{found.relative:.2f}"
        )


if __name__ == "__main__":
    main()
