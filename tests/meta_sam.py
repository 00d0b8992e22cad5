"""segment-anything's own model in the embedded model's dimensions."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import pytest
from torch import nn
from torchvision_shim import import_segment_anything
from transformers import SamModel

from carsam.models.sam.meta import state_dict_to_meta


def package() -> ModuleType:
    """The ``segment_anything`` package; the test is skipped where it is not installed."""
    try:
        return import_segment_anything()
    except ImportError:
        pytest.skip("segment-anything is not installed")


def small_sam() -> nn.Module:
    """Meta's ``Sam``, with the weights that its package draws."""
    modeling = package().modeling
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=8,
            embed_dim=192,
            img_size=256,
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=3,
            patch_size=16,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=[1, 3, 5, 7],
            window_size=7,
            out_chans=256,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=256, image_embedding_size=(16, 16), input_image_size=(256, 256), mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
        ),
    )
    return sam.eval()


def meta_twin(model: SamModel) -> nn.Module:
    """Meta's ``Sam`` with the weights of the embedded model."""
    sam = small_sam()
    sam.load_state_dict(state_dict_to_meta(model))
    # The embedded model's decoder was trained with transformers' eps, which differs from Meta's 1e-5.
    for theirs, ours in zip(sam.mask_decoder.transformer.layers, model.mask_decoder.transformer.layers):
        for i in range(1, 5):
            getattr(theirs, f"norm{i}").eps = getattr(ours, f"layer_norm{i}").eps
    return sam
