"""The image encoder's attention with quantized MatMuls: windows or the whole image, with relative positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SAM_VISION_ATTENTION_CLASSES, SamVisionAttention

from carsam.models.attention import MatMulQuantizers
from carsam.models.implementations import NOTICE

# The encoder's attentions have a table of their own in transformers. While a packed folder is loaded, it needs the
# attention that its config.json asks for; the packed form then takes its place.
SAM_VISION_ATTENTION_CLASSES[NOTICE] = SAM_VISION_ATTENTION_CLASSES["eager"]


class QuantizedVisionAttention(SamVisionAttention):
    """SAM's encoder attention with quantized MatMuls; relative positions are computed from the float query.

    It takes over the parameters of a ``SamVisionAttention``, so names in a state dict stay what they were.
    """

    def __init__(self, source: SamVisionAttention, matmul: MatMulQuantizers):
        nn.Module.__init__(self)
        for name in ("num_attention_heads", "scale", "dropout", "qkv", "proj", "use_rel_pos"):
            setattr(self, name, getattr(source, name))
        if self.use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = source.rel_pos_h, source.rel_pos_w
        self.matmul = matmul

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, None]:
        """(batch, height, width, channels) → the same; attention maps are not kept."""
        batch, height, width, _ = hidden_states.shape
        heads, tokens = self.num_attention_heads, height * width
        qkv = self.qkv(hidden_states).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.reshape(3, batch * heads, tokens, -1).unbind(0)

        relative = None
        if self.use_rel_pos:
            grid = query.reshape(batch * heads, height, width, -1)
            relative = (
                torch.einsum("bhwc,hkc->bhwk", grid, self.get_rel_pos(height, height, self.rel_pos_h)),
                torch.einsum("bhwc,wkc->bhwk", grid, self.get_rel_pos(width, width, self.rel_pos_w)),
            )
        output = self.matmul.attend_grid(query, key, value, self.scale, relative)
        output = output.reshape(batch, heads, height, width, -1).permute(0, 2, 3, 1, 4)
        return self.proj(output.reshape(batch, height, width, -1)), None
