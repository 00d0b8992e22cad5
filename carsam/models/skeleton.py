"""Models without weights: built to compare shapes, or to be filled."""

from __future__ import annotations

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

# What transformers raises for a configuration that contradicts itself (a width of "a", zero heads, ...).
BAD_CONFIG = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model on torch's meta device: shapes and names, no memory, no initialisation. Attention is eager.

    Args:
        model_class: Its class.
        config: Its ``_attn_implementation`` is set to "eager", so that attentions compute step by step.

    Raises:
        One of ``BAD_CONFIG``: The configuration contradicts itself.
    """
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return model_class(config)


@torch.no_grad()
def fill_buffers(model: PreTrainedModel) -> None:
    """Computes the buffers that no file holds (RoPE's frequencies, say), as transformers does when it loads a folder.

    Args:
        model: Once a skeleton, its tensors in place by now.
    """
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if module._non_persistent_buffers_set and not module._parameters:
            model._init_weights(module)
