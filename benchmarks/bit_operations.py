"""What bits a packed model really computes with: means over weights, over activations, and over its products.

    python benchmarks/bit_operations.py PACKED [PACKED ...]

A mean over activations counts elements; a site that few elements pass may have many bits for nearly nothing, though its
elements are multiplied as often as any. Bit operations (products times the bits of both factors) say what such a plan
would cost where time follows the bits. One image of noise with as many boxes as calibration has; layers that stay in
floating point count for nothing.
"""

from __future__ import annotations

from collections import Counter
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

    macs: Counter[tuple[int, int]] = field(default_factory=Counter)
    elements: Counter[int] = field(default_factory=Counter)

    @property
    def relative(self) -> float:
        """Bit operations, as a share of those with 4 bits everywhere."""
        return sum(macs * a * b for (a, b), macs in self.macs.items()) / (EVERYWHERE**2 * self.macs.total())

    @property
    def mean(self) -> float:
        """Mean bits of an activation."""
        return sum(bits * count for bits, count in self.elements.items()) / self.elements.total()

    @property
    def beyond(self) -> float:
        """Share of the products that have a factor of more than 4 bits."""
        return sum(n for bits, n in self.macs.items() if max(bits) > EVERYWHERE) / self.macs.total()


def watch_layer(found: Products, layer: PackedLayer) -> None:
    """Counts a layer's products when it runs."""

    def seen(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        bits = layer.input_quantizer.bits
        found.macs[layer.weight_bits, bits] += out.numel() * torch.Size(layer.shape[1:]).numel()
        found.elements[bits] += args[0].numel()

    layer.register_forward_hook(seen)


def watch_attention(found: Products, matmul: MatMulQuantizers) -> None:
    """Counts both products of an attention when its values, the last of the three, have come."""
    sizes: dict[str, torch.Size] = {}

    def seen(which: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            sizes[which] = out.shape
            found.elements[getattr(matmul, which).bits] += out.numel()
            if which == "value":
                scores = sizes["query"][:-1].numel() * sizes["key"][-2]
                found.macs[matmul.query.bits, matmul.key.bits] += scores * out.shape[-1]
                found.macs[matmul.probs.bits, matmul.value.bits] += scores * out.shape[-1]
                found.elements[matmul.probs.bits] += scores

        return hook

    for which in ("query", "key", "value"):
        getattr(matmul, which).register_forward_hook(seen(which))


@torch.no_grad()
def products_of(model: nn.Module, boxes: int) -> Products:
    """Products of one image with some boxes."""
    found = Products()
    for module in model.modules():
        if isinstance(module, PackedLayer) and module.weight_bits < 16 and module.input_quantizer.bits < 16:
            watch_layer(found, module)
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
