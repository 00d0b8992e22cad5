"""The small SAM 2 of transformers' own classes, and its pass over a clip: batched, with gradients."""

from __future__ import annotations

import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 256  # the model's input, px: every image is resized to this square, aspect ratio not kept, as SAM 2 does
LOW = SIZE // 4  # the decoder's mask, px
GRID = SIZE // 16  # the image embedding


def build_config():
    """The configuration: SAM 2.1's, with a small Hiera at 256 px and a memory-attention MLP of half the width."""
    from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VisionConfig
    from transformers.models.sam2_video.configuration_sam2_video import (
        Sam2VideoMaskDecoderConfig,
        Sam2VideoPromptEncoderConfig,
    )

    widths = [40, 80, 160, 240]
    hiera = Sam2HieraDetConfig(
        hidden_size=widths[0],
        image_size=[SIZE, SIZE],
        blocks_per_stage=[1, 2, 6, 1],
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[1, 2, 4, 6],
        window_size_per_stage=[8, 4, 8, 8],
        global_attention_blocks=[4, 6, 8],
    )
    vision = Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[SIZE // stride] * 2 for stride in (4, 8, 16)],
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(image_size=SIZE),
        mask_decoder_config=Sam2VideoMaskDecoderConfig(),
        image_size=SIZE,
        memory_attention_rope_feat_sizes=[GRID, GRID],
        memory_attention_feed_forward_hidden_size=1024,
        memory_attention_dropout=0.0,  # the training is short: it underfits
        memory_attention_rope_dropout=0.0,
    )


def build_model(seed: int = 0):
    """A `Sam2VideoModel` with PyTorch's own initialisation (transformers leaves embeddings at zero, for loading)."""
    from transformers import Sam2VideoModel

    torch.manual_seed(seed)
    model = Sam2VideoModel(build_config())
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("pos_embed", "pos_embed_window") or name.startswith(("no_", "memory_temporal", "occlusion_")):
            nn.init.trunc_normal_(parameter, std=0.02)
        elif ".memory_fuser." in name and leaf == "scale":
            nn.init.constant_(parameter, 0.1)  # 1e-6 would sleep through a short training
    features = torch.randn(2, model.hidden_dim // 2)  # one set of Fourier features: points and image share positions
    for name, buffer in model.named_buffers():
        if name.endswith("positional_embedding"):
            buffer.copy_(features)
    return model.eval()  # nothing drops out, and inference's choices (binarised mask, stability) hold in training


class _CachedSine(nn.Module):
    """The sine position encoding, computed once a size: transformers computes it for every image of a batch."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.cache = inner, {}

    def forward(self, shape, device, dtype, mask=None) -> Tensor:
        key = (*shape[2:], dtype)
        if key not in self.cache:
            with torch.autocast(device.type, enabled=False):
                self.cache[key] = self.inner((1, *shape[1:]), device, torch.float32).to(dtype)
        return self.cache[key].expand(shape[0], -1, -1, -1)


def _lean_attention(self, hidden_states: Tensor, **kwargs) -> Tensor:
    """`Sam2MultiScaleAttention.forward` without the matrix product in it whose result is never used."""
    batch, height, width, _ = hidden_states.shape
    qkv = self.qkv(hidden_states).reshape(batch, height * width, 3, self.num_attention_heads, -1)
    query, key, value = qkv.unbind(2)
    if self.query_stride:
        query = query.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        query = F.max_pool2d(query, self.query_stride, self.query_stride).permute(0, 2, 3, 1)
        height, width = query.shape[1:3]
        query = query.reshape(batch, height * width, self.num_attention_heads, -1)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
    return self.proj(out.transpose(1, 2).reshape(batch, height, width, -1))


def speed_up(model) -> None:
    """For training: constant position encodings are kept, dead work in the image encoder is left out (same results)."""
    model.vision_encoder.neck.position_encoding = _CachedSine(model.vision_encoder.neck.position_encoding)
    model.memory_encoder.position_encoding = _CachedSine(model.memory_encoder.position_encoding)
    for block in model.vision_encoder.backbone.blocks:
        block.attn.forward = types.MethodType(_lean_attention, block.attn)


@dataclass
class Features:
    """An image batch's features: stride 4 (N, 32, 64, 64), stride 8 (N, 64, 32, 32), embedding (N, 256, 16, 16)."""

    stride4: Tensor
    stride8: Tensor
    embedding: Tensor
    position: Tensor  # (256 tokens, 1, 256): the embedding's position encoding

    def repeat(self, times: int) -> Features:
        """Every item `times` times in a row: one for each object of an image."""
        maps = (x[:, None].expand(-1, times, -1, -1, -1).flatten(0, 1) for x in self.maps())
        return Features(*maps, self.position)

    def frames(self, count: int) -> list[Features]:
        """The features of (B * T) frames as T batches of B."""
        maps = [x.unflatten(0, (-1, count)).unbind(1) for x in self.maps()]
        return [Features(*parts, self.position) for parts in zip(*maps, strict=True)]

    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.stride4, self.stride8, self.embedding


@dataclass
class Decoded:
    """All four masks of the decoder for N prompts; the first is the single one, the other three the ambiguous ones."""

    masks: Tensor  # (N, 4, 64, 64) logits
    iou: Tensor  # (N, 4)
    tokens: Tensor  # (N, 4, 256)
    score: Tensor  # (N, 1) logit: is the object there


def encode(model, pixels: Tensor) -> Features:
    """Run the image encoder on (N, 3, 256, 256), as `get_image_features` does, without flattening."""
    out = model.vision_encoder(pixels, return_dict=True)
    stride4, stride8, embedding = out.fpn_hidden_states
    decoder = model.mask_decoder
    position = out.fpn_position_encoding[-1][:1].flatten(2).permute(2, 0, 1)
    return Features(decoder.conv_s0(stride4), decoder.conv_s1(stride8), embedding, position)


def embed_prompts(model, points: Tensor, labels: Tensor) -> Tensor:
    """(N, 1, n + 1, 256): `_embed_points` of the prompt encoder, its table read by a product, as a CUDA graph can."""
    encoder = model.prompt_encoder
    points = F.pad(points + 0.5, (0, 0, 0, 1))[:, None]
    labels = F.pad(labels, (0, 1), value=-1)[:, None]
    embedding = encoder.shared_embedding(points, (SIZE, SIZE))
    embedding = torch.where(labels[..., None] == -1, encoder.not_a_point_embed.weight, embedding)
    which = labels[..., None] == torch.arange(4, device=labels.device)
    return embedding + which.to(embedding.dtype) @ encoder.point_embed.weight


def decode(model, features: Features, points: Tensor | None, labels: Tensor | None, dense: Tensor | None) -> Decoded:
    """Prompt encoder and mask decoder, one prompt an item, all four masks kept.

    Args:
        features: N items' features, the embedding with memory or with the no-memory embedding added.
        points: (N, n, 2) pixel coordinates, or None for no prompt.
        labels: (N, n): 1 inside, 0 outside, 2 and 3 a box's corners.
        dense: (N, 256, 16, 16) embedded masks, or None.
    """
    decoder, count, device = model.mask_decoder, len(features.embedding), features.embedding.device
    if points is None:
        points = torch.zeros(count, 1, 2, device=device)
        labels = -torch.ones(count, 1, dtype=torch.int32, device=device)
    with torch.autocast(device.type, enabled=False):  # positions in bfloat16 would be a pixel off
        sparse = embed_prompts(model, points.float(), labels)
        position = model.get_image_wide_positional_embeddings()
    if dense is None:
        dense = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    start = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([start.expand(count, 1, -1, -1), sparse], dim=2)
    queries, keys = decoder.transformer(
        point_embeddings=tokens,
        image_embeddings=features.embedding + dense,
        image_positional_embeddings=position.expand(count, -1, -1, -1),
        attention_similarity=None,
    )
    keys = keys.transpose(2, 3).reshape(count, -1, GRID, GRID)
    upscaled = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(keys) + features.stride8))
    upscaled = decoder.activation(decoder.upscale_conv2(upscaled) + features.stride4)
    mask_tokens = queries[:, 0, 2 : 2 + decoder.num_mask_tokens]
    hyper = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    masks = (hyper @ upscaled.flatten(2)).unflatten(2, (LOW, LOW))
    iou, score = decoder.iou_prediction_head(queries[:, 0, 1]), decoder.pred_obj_score_head(queries[:, 0, 0])
    return Decoded(masks.float(), iou.float(), mask_tokens, score.float())


def select(model, out: Decoded, multimask: bool) -> tuple[Tensor, Tensor]:
    """The mask (N, 1, 64, 64) and token (N, 256) that inference goes on with."""
    best = 1 + out.iou[:, 1:].argmax(1)
    best_mask = out.masks.gather(1, best.view(-1, 1, 1, 1).expand(-1, 1, LOW, LOW))
    if multimask:
        return best_mask, out.tokens.gather(1, best.view(-1, 1, 1).expand(-1, 1, out.tokens.shape[2]))[:, 0]
    decoder = model.mask_decoder
    stable = decoder._get_stability_scores(out.masks[:, :1]) >= decoder.dynamic_multimask_stability_thresh
    return torch.where(stable[..., None, None], out.masks[:, :1], best_mask), out.tokens[:, 0]


def track(
    model,
    features: list[Features],
    points: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    span: Tensor,
    gap: Tensor,
) -> tuple[list[Decoded], list[Tensor]]:
    """Follow N objects through a clip as `Sam2VideoModel` does at inference; gradients flow through the memory.

    Args:
        features: one a frame, N items each.
        points: (N, n, 2) prompts on the first frame, or None with `mask`.
        labels: (N, n).
        mask: (N, 1, 256, 256) in 0..1, the first frame's mask prompt, or None.
        span: (1,) unit of the pointers' time, frames: min(length of the video, 16) - 1.
        gap: (1,) frames left out between the first and the second frame of the clip.

    Returns:
        For every frame what the decoder gave, and the chosen low-resolution mask logits (N, 1, 64, 64).
    """
    from transformers.models.sam2_video.modeling_sam2_video import NO_OBJ_SCORE

    decoded, chosen, memories, pointers = [], [], [], []
    for time_index, frame in enumerate(features):
        embedding, count = frame.embedding, len(frame.embedding)
        if time_index and len(memories):
            embedding = _with_memory(model, frame, memories, pointers, span, gap)
        elif mask is None:
            embedding = embedding + model.no_memory_embedding.reshape(1, -1, 1, 1)
        current = Features(frame.stride4, frame.stride8, embedding, frame.position)
        first, multimask = time_index == 0, True
        if first and mask is not None:
            out = decode(model, current, None, None, model.prompt_encoder.mask_embed(model.mask_downsample(mask)))
        elif first:
            out = decode(model, current, points, labels, None)
            multimask = points.shape[1] <= model.config.multimask_max_pt_num
        else:
            out = decode(model, current, None, None, None)
        low, token = select(model, out, multimask)
        there = (out.score > 0).to(low.dtype)
        low = torch.where(there[..., None, None] > 0, low, NO_OBJ_SCORE)
        pointer = model.object_pointer_proj(token)
        pointer = there * pointer + (1 - there) * model.no_object_pointer
        high = F.interpolate(low, (SIZE, SIZE), mode="bilinear", align_corners=False)
        score = out.score
        if first and mask is not None:
            # a mask prompt is its own output, and it says whether the object is there
            seen = mask.flatten(1).amax(1, keepdim=True).gt(0).to(low.dtype)
            pointer = seen * pointer + (1 - seen) * model.no_object_pointer
            high, score = mask * 20.0 - 10.0, seen * 20.0 - 10.0
            low = F.interpolate(high, (LOW, LOW), mode="bilinear", align_corners=False, antialias=True)
        if time_index + 1 < len(features):
            memory, position = model._encode_new_memory(
                frame.embedding.flatten(2).permute(2, 0, 1), high, score[..., None], is_mask_from_pts=first
            )
            memories.append((memory, position))
            pointers.append(pointer)
        decoded.append(out)
        chosen.append(low)
        assert len(pointer) == count
    return decoded, chosen


def _with_memory(model, frame: Features, memories, pointers, span: Tensor, gap: Tensor) -> Tensor:
    """Memory attention: the prompted frame, up to six frames before this one, and their object pointers."""
    from transformers.models.sam2_video.modeling_sam2_video import get_1d_sine_pe

    now, count, dtype = len(memories), len(frame.embedding), frame.embedding.dtype
    slots = [(0, memories[0])]
    slots += [(back, memories[now - back]) for back in range(model.num_maskmem - 1, 0, -1) if now - back > 0]
    tokens = [memory for _, (memory, _) in slots]
    positions = [pos + model.memory_temporal_positional_encoding[back - 1] for back, (_, pos) in slots]
    # pointers: of the prompted frame, then one to fifteen frames back; each is split into tokens of the memory's width
    recent = min(now, model.config.max_object_pointers_in_encoder)
    pointer = torch.stack([pointers[0], *(pointers[now - back] for back in range(1, recent))])
    splits = model.hidden_dim // model.mem_dim
    pointer = pointer.reshape(-1, count, splits, model.mem_dim).permute(0, 2, 1, 3).flatten(0, 1)
    with torch.autocast(gap.device.type, enabled=False):
        offsets = torch.cat([gap + now, torch.arange(1, recent, device=gap.device, dtype=gap.dtype)]) / span
        times = model.temporal_positional_encoding_projection_layer(get_1d_sine_pe(offsets, dim=model.hidden_dim))
    times = times[:, None, None].expand(-1, splits, count, -1).flatten(0, 1)
    out = model.memory_attention(
        current_vision_features=frame.embedding.flatten(2).permute(2, 0, 1),
        current_vision_position_embeddings=frame.position,
        memory=torch.cat([token.to(dtype) for token in tokens] + [pointer.to(dtype)]),
        memory_posision_embeddings=torch.cat([*positions, times]),
        num_object_pointer_tokens=len(pointer),
    )
    return out[0].transpose(1, 2).reshape(count, -1, GRID, GRID)
