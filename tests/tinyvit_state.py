"""Small MobileSAMs and LiteMedSAMs in their published form, with batch norms that have something to fold."""

from __future__ import annotations

import torch
from torch import Tensor

from carsam.models.skeleton import skeleton
from carsam.models.tinyvit.meta import tensor_map
from carsam.models.tinyvit.modeling import TinyVitSamModel
from carsam.models.tinyvit.random import tinyvit_config

# Every stage and kind of block, windows that divide no side of the map, in a fiftieth of the parameters.
SMALL = {
    "embed_dims": [8, 16, 20, 24],
    "depths": [1, 1, 2, 1],
    "num_heads": [2, 5, 3],
    "window_sizes": [7, 5, 3],
    "mlp_ratio": 2.0,
    "expand_ratio": 3.0,
}
# Sides of the input with which both kinds have the same maps.
SIDES = {"mobilesam": 128, "litemedsam": 32}


def published_state(kind: str = "mobilesam", seed: int = 0, **vision: object) -> dict[str, Tensor]:
    """A random state dict with the names, shapes and leftovers of a published checkpoint.

    Args:
        kind: "mobilesam" or "litemedsam".
        seed: Of the weights.
        **vision: Settings of the encoder; ``SMALL`` where there are none.
    """
    model = skeleton(TinyVitSamModel, tinyvit_config(kind, SIDES[kind], **(vision or SMALL)))
    random = torch.Generator().manual_seed(seed)
    names = tensor_map(model)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for part in names[name]:
            if part in state:  # the weight of a folded convolution stands before its bias, and has all five parts
                continue
            if ".bn." not in part:
                state[part] = torch.randn(tensor.shape, generator=random) / max(1, tensor[0].numel()) ** 0.5
            elif part.endswith(("weight", "running_var")):
                state[part] = 0.5 + torch.rand(len(tensor), generator=random)
            else:
                state[part] = 0.3 * torch.randn(len(tensor), generator=random)
            if part.endswith("bn.running_var"):
                state[part.replace("running_var", "num_batches_tracked")] = torch.tensor(1000)
        if name.endswith("attention_biases"):
            state[names[name][0].replace("biases", "bias_idxs")] = torch.zeros(1, dtype=torch.long)
    if kind == "mobilesam":
        state["image_encoder.norm_head.weight"] = torch.ones(24)
        state["image_encoder.norm_head.bias"] = torch.zeros(24)
        state["image_encoder.head.weight"] = torch.zeros(1000, 24)
        state["image_encoder.head.bias"] = torch.zeros(1000)
    return state
