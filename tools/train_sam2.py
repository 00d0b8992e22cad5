"""Train `sam2-nano-256`, a small SAM 2 of transformers' own classes, from scratch on still images with instance masks.

The model is a `Sam2VideoModel` (`Sam2Model` loads it too): prompt encoder, mask decoder, memory encoder and object
pointers as in SAM 2.1, memory attention with half as wide an MLP, and a small Hiera as image encoder. Training first
takes single images, then clips that are made of stills: an image that moves and bends, with cut-out objects of other
images moving over it, so that objects are hidden, leave and come back. The forward pass over a clip is the computation
of `Sam2VideoModel` at inference (memory of seven frames, object pointers, binarised first mask, hard choice by the
object score), batched; `selftest` proves it against the model's own inference session.

    train_sam2.py pack clips.npz DATA/train-mix DATA/coco-train100          # COCO-form folders into one file
    train_sam2.py selftest                                                  # clip forward = inference session
    train_sam2.py train clips.npz OUT_DIR --minutes 9.1                     # one GPU; a CPU only tries it out
    train_sam2.py export OUT_DIR embedded/sam2-nano-256                     # shards into a transformers folder
    train_sam2.py images embedded/sam2-nano-256 DATA/coco-val50             # box prompts: mean IoU, segm AP
    train_sam2.py video embedded/sam2-nano-256 DATA/davis16-a               # J, F, J&F from the first frame
"""

import argparse
import copy
import dataclasses
import io
import json
import lzma
import math
import os
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SIZE = 256  # the model's input, px: every image is resized to this square, aspect ratio not kept, as SAM 2 does
LOW = SIZE // 4  # the decoder's mask, px
GRID = SIZE // 16  # the image embedding
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, SAM 2's normalisation


# ---------------------------------------------------------------------------------------------------------------- model


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

    def repeat(self, times: int) -> "Features":
        """Every item `times` times in a row: one for each object of an image."""
        maps = (x[:, None].expand(-1, times, -1, -1, -1).flatten(0, 1) for x in self.maps())
        return Features(*maps, self.position)

    def frames(self, count: int) -> list["Features"]:
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


# ----------------------------------------------------------------------------------------------------------------- data


def pack(out: Path, folders: list[Path], size: int, quality: int) -> None:
    """Write images (WebP, squares of `size` px) and masks (run lengths, zeros first, an even number) into one file."""
    from pycocotools import mask as mask_utils

    images, sources, owners, runs, lengths = [], [], [], [], []
    for folder in folders:
        index = json.loads((folder / "instances.json").read_text())
        by_image: dict[int, list] = {}
        for annotation in index["annotations"]:
            if not annotation.get("iscrowd") and annotation["area"] >= 100:
                by_image.setdefault(annotation["image_id"], []).append(annotation)
        for entry in index["images"]:
            if entry["id"] not in by_image:
                continue
            picture = Image.open(folder / "images" / entry["file_name"]).convert("RGB")
            buffer = io.BytesIO()
            picture.resize((size, size), Image.Resampling.LANCZOS).save(buffer, "WEBP", quality=quality)
            masks = []
            for annotation in by_image[entry["id"]]:
                code = annotation["segmentation"]
                if isinstance(code, list) or isinstance(code["counts"], list):
                    code = mask_utils.frPyObjects(code, entry["height"], entry["width"])
                    code = mask_utils.merge(code) if isinstance(code, list) else code
                shape = Image.fromarray(mask_utils.decode(code) * 255).resize((size, size), Image.Resampling.BOX)
                masks.append(np.asarray(shape) >= 128)
            source = entry.get("source", "coco")
            if source == "ccp":
                masks.append(np.any(masks, axis=0))  # all garments and skin together: the person
            masks = [mask for mask in masks if mask.sum() >= 40]
            if not masks:
                continue
            for mask in masks:
                flat = mask.ravel()
                ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
                run = np.diff(np.concatenate([[0], ends, [flat.size]]))
                run = np.concatenate([[0], run]) if flat[0] else run
                run = np.concatenate([run, [0]]) if len(run) % 2 else run
                runs.append(run.astype(np.uint32))
                lengths.append(len(run))
                owners.append(len(images))
            images.append(np.frombuffer(buffer.getvalue(), np.uint8))
            sources.append(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    packed_runs = lzma.compress(np.concatenate(runs).tobytes())
    np.savez(
        out,
        size=size,
        images=np.concatenate(images),
        image_lengths=np.array([len(image) for image in images]),
        sources=np.array(sources),
        owners=np.array(owners, np.int32),
        run_lengths=np.array(lengths, np.int32),
        runs=np.frombuffer(packed_runs, np.uint8),
    )
    print(len(images), "images", len(owners), "masks", out.stat().st_size / 1e6, "MB")


class Pool:
    """All training images (N, 3, S, S) and masks (M, S, S), uint8, on the device, with what sampling needs to know."""

    IMAGE_WEIGHT: ClassVar = {"coco": 5.0, "bsds": 1.5, "ccp": 1.0, "camvid": 0.8, "dsb2018": 0.4}
    CUT_WEIGHT: ClassVar = {"coco": 6.0, "bsds": 1.0, "ccp": 1.0, "camvid": 1.0, "dsb2018": 0.0}

    def __init__(self, path: Path, device: torch.device, limit: int = 0):
        data = np.load(path)
        self.size, self.device = int(data["size"]), device
        owners, lengths = data["owners"], data["run_lengths"]
        keep = limit or len(data["image_lengths"])
        picked = np.linspace(0, len(data["image_lengths"]) - 1, keep).astype(int)
        bounds = np.concatenate([[0], np.cumsum(data["image_lengths"])])
        blob = data["images"]

        def read(number: int) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(blob[bounds[number] : bounds[number + 1]].tobytes())))

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            images = np.stack(list(threads.map(read, picked)))
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
        runs = np.frombuffer(lzma.decompress(data["runs"].tobytes()), np.uint32).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        first, counts, masks, sources = [], [], [], data["sources"][picked]
        for number in picked:
            mine = np.flatnonzero(owners == number)
            first.append(sum(counts))
            counts.append(len(mine))
            run = torch.from_numpy(runs[starts[mine[0]] : starts[mine[-1] + 1]]).to(device)
            value = (torch.arange(len(run), device=device) % 2).to(torch.uint8)
            masks.append(torch.repeat_interleave(value, run).view(len(mine), self.size, self.size))
        self.masks = torch.cat(masks)
        self.first, self.counts = torch.tensor(first, device=device), torch.tensor(counts, device=device)
        self.owner = torch.repeat_interleave(torch.arange(keep, device=device), self.counts)
        self.area, self.center, self.half = self._measure()
        weight = torch.tensor([self.IMAGE_WEIGHT[str(source)] for source in sources], device=device)
        self.image_weight = weight.double()
        cut = torch.tensor([self.CUT_WEIGHT[str(source)] for source in sources], device=device)[self.owner].double()
        cut = cut / self.counts[self.owner] * (self.area > 0.015) * (self.area < 0.5) * (1 + 3 * self.area)
        self.cut_weight = cut
        self.mean = torch.tensor(MEAN, device=device).view(3, 1, 1) * 255
        self.std = torch.tensor(STD, device=device).view(3, 1, 1) * 255

    def _measure(self) -> tuple[Tensor, Tensor, Tensor]:
        """Area (fraction), box centre and half size (in -1..1) of every mask."""
        areas, boxes = [], []
        for chunk in self.masks.split(2048):
            areas.append(chunk.flatten(1).sum(1, dtype=torch.float32) / self.size**2)
            boxes.append(boxes_of(chunk))
        box = torch.cat(boxes) / self.size * 2 - 1
        return torch.cat(areas), (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]) / 2

    def pixels(self, index: Tensor) -> Tensor:
        return (self.images[index].float() - self.mean) / self.std


def boxes_of(masks: Tensor) -> Tensor:
    """(N, 4) x0, y0, x1, y1 in pixels (outer edges) of (N, H, W) masks; zeros for an empty one."""
    edges = []
    for reduced in (masks.amax(1), masks.amax(2)):  # over rows: columns that are hit; over columns: rows
        hit = (reduced > 0).int()
        edges += [hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)]
    x0, x1, y0, y1 = edges
    box = torch.stack([x0, y0, x1, y1], 1).float()
    return box * (masks.flatten(1).amax(1) > 0)[:, None]


class ClipMaker:
    """Makes batches of clips (or single images) on the device: a warped still and up to two cut-outs moving over it."""

    def __init__(self, pool: Pool, seed: int):
        self.pool, self.device = pool, pool.device
        self.rng = torch.Generator(self.device).manual_seed(seed)
        line = (torch.arange(SIZE, device=self.device) + 0.5) / SIZE * 2 - 1
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.box_labels = torch.tensor([2, 3], device=self.device, dtype=torch.int32)
        self.coords = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # (3, HW)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, device=self.device, generator=self.rng)

    def normal(self, std: float, *shape: int) -> Tensor:
        return std * torch.randn(shape, device=self.device, generator=self.rng)

    def walk(self, std: float, batch: int, frames: int, dim: int, speed: Tensor) -> Tensor:
        """(B, T, dim) smooth paths from 0 with a step of about `std`, scaled by each clip's `speed`."""
        if frames == 1:
            return torch.zeros(batch, 1, dim, device=self.device)
        velocity = self.normal(std, batch, 1, dim) + 0.5 * self.normal(std, batch, frames - 1, dim).cumsum(1)
        path = (velocity * speed.view(-1, 1, 1)).cumsum(1)
        return torch.cat([torch.zeros_like(path[:, :1]), path], 1)

    def grid(self, center: Tensor, place: Tensor, scale: Tensor, aspect, angle, flip, bend: float) -> Tensor:
        """Sampling positions (B, T, H, W, 2): source = center + M (output - place), and a moving elastic field.

        Args:
            center: (B, T, 2) position in the source, -1..1.
            place: (B, T, 2) where that position is seen in the output.
            scale: (B, T) source units for an output unit.
            aspect: (B, T) stretch of x against y.
            angle: (B, T) radians.
            flip: (B,) 1 or -1.
            bend: amplitude of the elastic field in output units.
        """
        batch, frames = scale.shape
        cos, sin = angle.cos(), angle.sin()
        x, y = scale * aspect * flip[:, None], scale / aspect
        matrix = torch.stack([torch.stack([x * cos, -y * sin], -1), torch.stack([x * sin, y * cos], -1)], -2)
        shift = center - (matrix @ place[..., None])[..., 0]
        grid = torch.cat([matrix, shift[..., None]], -1) @ self.coords  # (B, T, 2, HW)
        grid = grid.view(batch, frames, 2, SIZE, SIZE)
        field = F.interpolate(self.normal(1.0, batch, 4, 5, 5), (SIZE, SIZE), mode="bicubic", align_corners=True)
        phase, rate = self.uniform(0, 2 * math.pi, batch, 1, 2), self.normal(0.35, batch, 1, 2)
        steps = torch.arange(frames, device=self.device).view(1, -1, 1)
        amount = (phase + rate * steps).sin() * bend * self.uniform(0, 1, batch, 1, 1)  # (B, T, 2)
        field = field.view(batch, 2, 2, SIZE, SIZE)
        for part in range(2):
            grid = grid + (amount[:, :, part] * scale).view(batch, frames, 1, 1, 1) * field[:, None, part]
        return grid.permute(0, 1, 3, 4, 2)

    def sample(self, source: Tensor, grid: Tensor) -> Tensor:
        """(B, C, S, S) seen through (B, T, H, W, 2) as (B, T, C, H, W); zeros outside."""
        batch, frames = grid.shape[:2]
        out = F.grid_sample(source, grid.reshape(batch, frames * SIZE, SIZE, 2), align_corners=False)
        return out.view(batch, -1, frames, SIZE, SIZE).transpose(1, 2)

    @torch.no_grad()
    def make(self, batch: int, frames: int, base_masks: int, layers: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Frames (B, T, 3, 256, 256), normalised, and masks (B, K, T, 256, 256), bool, of what can be seen.

        Args:
            batch: clips.
            frames: frames a clip.
            base_masks: objects taken from the still; the cut-outs follow as further objects.
            layers: for every cut-out layer, lowest first, how often it is there.
        """
        pool = self.pool
        speed = self.normal(0.7, batch).exp().clamp(max=3)
        number = torch.multinomial(pool.image_weight, batch, replacement=True, generator=self.rng)
        draw = self.uniform(0, 1, batch, base_masks)
        chosen = pool.first[number][:, None] + (draw * pool.counts[number][:, None]).long()
        scale = self.uniform(math.log(0.45), math.log(1.15), batch, 1).exp()
        room = (1 - scale).clamp(min=0.1)  # how far the view may leave the middle
        center = pool.center[chosen[:, 0]] + self.uniform(-0.8, 0.8, batch, 2) * scale
        center = torch.minimum(torch.maximum(center, -room), room)[:, None] + self.walk(0.025, batch, frames, 2, speed)
        zoom = self.walk(0.012, batch, frames, 1, speed)[..., 0].exp()
        grid = self.grid(
            center,
            torch.zeros_like(center),
            scale * zoom,
            self.normal(0.12, batch, 1).exp() * self.walk(0.008, batch, frames, 1, speed)[..., 0].exp(),
            self.normal(0.12, batch, 1) + self.walk(0.015, batch, frames, 1, speed)[..., 0],
            self._flip(batch),
            bend=0.05,
        )
        seen = self.sample(torch.cat([pool.pixels(number), pool.masks[chosen].float()], 1), grid)
        view, masks = self._light(seen[:, :, :3], speed), [seen[:, :, 3:]]
        for share in layers:
            cut, there = self._layer(batch, frames, share, speed)
            alpha = cut[:, :, 3:] * there.view(-1, 1, 1, 1, 1)
            view = view * (1 - alpha) + self._light(cut[:, :, :3], speed) * alpha
            masks = [mask * (1 - alpha) for mask in masks] + [alpha]
        view = self._light(view, speed, drift=0.01)
        soft = self.uniform(0, 1, batch) < 0.2
        blurred = F.avg_pool2d(view.flatten(0, 1), 3, 1, 1).view_as(view)
        view = torch.where(soft.view(-1, 1, 1, 1, 1), blurred, view)
        grey = (self.uniform(0, 1, batch) < 0.1).view(-1, 1, 1, 1, 1)
        view = torch.where(grey, view.mean(2, keepdim=True).expand_as(view), view)
        return view, (torch.cat(masks, 2) > 0.5).transpose(1, 2)

    def _flip(self, batch: int) -> Tensor:
        return (self.uniform(0, 1, batch) < 0.5).float() * 2 - 1

    def _light(self, view: Tensor, speed: Tensor, drift: float = 0.0) -> Tensor:
        """Contrast, brightness and colour of (B, T, 3, H, W), drifting over the frames."""
        batch, frames = view.shape[:2]
        gain = self.uniform(0.75, 1.3, batch, 1, 1) * self.uniform(0.92, 1.08, batch, 1, 3)
        offset = self.normal(0.2, batch, 1, 1) + self.normal(0.05, batch, 1, 3)
        if drift:
            still = torch.ones_like(speed)
            gain = gain * self.walk(drift, batch, frames, 1, still).exp()
            offset = offset + self.walk(drift, batch, frames, 1, still)
        return view * gain[..., None, None] + offset[..., None, None]

    def _layer(self, batch: int, frames: int, share: float, speed: Tensor) -> tuple[Tensor, Tensor]:
        """A cut-out on its own path: (B, T, 4, H, W) colours and coverage, and whether the clip has it."""
        pool = self.pool
        cut = torch.multinomial(pool.cut_weight, batch, replacement=True, generator=self.rng)
        size = self.uniform(math.log(0.12), math.log(0.75), batch, 1).exp()  # half size in the output
        zoom = self.walk(0.025, batch, frames, 1, speed)[..., 0].exp()
        place = self.uniform(-0.85, 0.85, batch, 1, 2) + self.walk(0.06, batch, frames, 2, speed)
        grid = self.grid(
            pool.center[cut][:, None].expand(-1, frames, -1),
            place,
            pool.half[cut].amax(1, keepdim=True) / size * zoom,
            self.normal(0.12, batch, 1).exp() * self.walk(0.015, batch, frames, 1, speed)[..., 0].exp(),
            self.normal(0.25, batch, 1) + self.walk(0.03, batch, frames, 1, speed)[..., 0],
            self._flip(batch),
            bend=0.08,
        )
        source = torch.cat([pool.pixels(pool.owner[cut]), pool.masks[cut][:, None].float()], 1)
        return self.sample(source, grid), (self.uniform(0, 1, batch) < share).float()

    def boxes(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """A box prompt as two points (N, 2, 2) and labels (N, 2); half of the boxes are drawn carelessly."""
        box = boxes_of(masks.to(torch.uint8))
        sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)
        careless = (self.uniform(0, 1, len(box), 1) < 0.5).float()
        box = box + careless * (self.normal(0.07, len(box), 4).clamp(-0.15, 0.15) * sides).clamp(-16, 16)
        corners = box.clamp(0, SIZE).view(-1, 2, 2)
        return corners, self.box_labels.expand(len(box), 2)

    def click(self, where: Tensor, noise: Tensor | None = None) -> Tensor:
        """(N, 1, 2) a random pixel's x, y in each of (N, H, W) bool masks (the top left corner if empty)."""
        noise = self.uniform(0.01, 1, *where.shape) if noise is None else noise
        index = (noise * where).flatten(1).argmax(1)
        return torch.stack([index % SIZE, index // SIZE], 1)[:, None].float()

    def clicks(self, masks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` clicks: the first inside, the others inside or in a ring around the object."""
        points, labels = [self.click(masks)], [torch.ones(len(masks), 1, dtype=torch.int32, device=self.device)]
        for _ in range(count - 1):
            inside = self.uniform(0, 1, len(masks)) < 0.5
            wide = F.max_pool2d(masks[:, None].float(), (31, 1), 1, (15, 0))
            ring = F.max_pool2d(wide, (1, 31), 1, (0, 15))[:, 0].bool() & ~masks
            inside = inside | ~ring.flatten(1).any(1)
            points.append(self.click(torch.where(inside[:, None, None], masks, ring)))
            labels.append(inside[:, None].int())
        return torch.cat(points, 1), torch.cat(labels, 1)


# ------------------------------------------------------------------------------------------------------------- training


def mask_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (N, K) of (N, K, 64, 64) logits against the covered share (N, 64, 64), and the true IoU (N, K)."""
    share = target[:, None].expand_as(logits)
    chance = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, share, reduction="none")
    right = chance * share + (1 - chance) * (1 - share)
    focal = ((0.25 * share + 0.75 * (1 - share)) * (1 - right) ** 2 * entropy).mean((-1, -2))
    both, total = (chance * share).sum((-1, -2)), chance.sum((-1, -2)) + share.sum((-1, -2))
    dice = 1 - (2 * both + 1) / (total + 1)
    with torch.no_grad():
        found, true = logits > 0, share > 0.5
        iou = (found & true).sum((-1, -2)) / (found | true).sum((-1, -2)).clamp(min=1)
    return 10 * focal + 2 * entropy.mean((-1, -2)) + dice, iou


def prompt_loss(out: Decoded, target: Tensor, seen: Tensor, valid: Tensor, single: Tensor, multi: Tensor):
    """The loss of N prompts: masks and predicted IoU where the object is seen, the object score everywhere.

    Args:
        out: what the decoder gave.
        target: (N, 64, 64) covered share.
        seen: (N,) 1 where the object can be seen, 0 where not.
        valid: (N,) weight of the item.
        single: (N,) weight of the single mask.
        multi: (N,) weight of the best of the three others.

    Returns:
        The loss and every item's IoU of the mask that inference would choose (no gradient), for the log.
    """
    losses, iou = mask_losses(out.masks, target)
    weight = seen * valid
    weight = weight / weight.sum().clamp(min=1)
    used = torch.stack([single > 0, multi > 0, multi > 0, multi > 0], 1).float()
    loss = single * losses[:, 0] + multi * losses[:, 1:].amin(1)
    loss = loss + ((out.iou - iou).abs() * used).sum(1) / used.sum(1)
    score = F.binary_cross_entropy_with_logits(out.score[:, 0], seen, reduction="none")
    total = (loss * weight).sum() + (score * valid).sum() / valid.sum().clamp(min=1)
    chosen = iou[:, 1:].gather(1, out.iou[:, 1:].argmax(1, keepdim=True))[:, 0]
    return total, torch.where(single > multi, iou[:, 0], chosen).detach()


def mean_of(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp(min=1)


def shrink(masks: Tensor) -> Tensor:
    """(N, 256, 256) bool to the covered share of the (N, 64, 64) cells of the decoder's mask."""
    return F.avg_pool2d(masks[:, None].float(), SIZE // LOW)[:, 0]


class Steps:
    """Runs a step's forward and backward pass; on a GPU as a CUDA graph, since launching kernels is the bottleneck.

    Gradients live in fixed tensors: a step zeroes them and adds to them. A graph is only used if its gradients agree
    with those of the same step without it.
    """

    def __init__(self, model: nn.Module, graphs: bool):
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.graphs, self.captured, self.pool = graphs, {}, None

    def activate(self, idle: tuple[str, ...]) -> None:
        """Give every parameter its gradient, but not those whose name starts with `idle`: the optimiser skips them."""
        for name, parameter, gradient in zip(self.names, self.parameters, self.gradients, strict=True):
            parameter.grad = None if name.startswith(idle) else gradient

    def plain(self, function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        torch._foreach_zero_(self.gradients)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not self.graphs):
            loss, notes = function(**inputs)
        loss.backward()
        return {"loss": loss.detach(), **notes}

    def __call__(self, key: tuple, function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of `function(**inputs)`; returns loss and notes. `key`: what else the computation depends on."""
        if not self.graphs:
            return self.plain(function, inputs)
        if key not in self.captured:
            self.captured[key] = self.capture(key, function, inputs)
        if self.captured[key] is None:
            return self.plain(function, inputs)
        graph, held, outputs = self.captured[key]
        for name, tensor in inputs.items():
            held[name].copy_(tensor)
        graph.replay()
        return outputs

    def capture(self, key: tuple, function, inputs: dict[str, Tensor]):
        start = time.time()
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.plain(function, held)
        torch.cuda.current_stream().wait_stream(side)
        expected = [gradient.clone() for gradient in self.gradients]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = self.plain(function, held)
            self.pool = self.pool or graph.pool()
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            print("no graph for", key, str(error)[:300], flush=True)
            return None
        square = sum((g - e).square().sum() for g, e in zip(self.gradients, expected, strict=True))
        off = (square / sum(e.square().sum() for e in expected)).sqrt().item()
        print(f"graph {key} gradients off by {off:.1e}, {time.time() - start:.1f}s", flush=True)
        return (graph, held, outputs) if off < 0.1 else None


class Trainer:
    """Model, its running average, optimiser and the two kinds of steps."""

    CLIP_ONLY = (
        "memory_",
        "mask_downsample",
        "object_pointer",
        "temporal_",
        "occlusion_",
        "no_object",
        "no_memory_pos",
    )

    def __init__(self, args: argparse.Namespace, pool: Pool):
        self.args, self.pool, self.device = args, pool, pool.device
        self.model = build_model(args.seed).to(self.device)
        speed_up(self.model)
        self.model.set_attn_implementation("sdpa")
        self.clips = ClipMaker(pool, args.seed + 1)
        self.steps = Steps(self.model, graphs=self.device.type == "cuda" and not args.no_graphs)
        self.parameters = self.steps.parameters
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        self.average = [p.detach().clone() for p in self.parameters]
        self.step, self.spent, self.steps_of = 0, 0.0, {"image": 0, "clip": 0}
        self.log: dict[str, Tensor] = {}
        self.prefer = torch.tensor([1.0, 0.6, 1.3, 0.9], device=self.device)  # of a clip's objects, lowest layer first

    def note(self, key: str, value: Tensor) -> None:
        self.log[key] = value.clone() if key not in self.log else 0.97 * self.log[key] + 0.03 * value

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def image_step(self) -> None:
        """A batch of single images with boxes (two thirds) or one or three clicks; every third step tries again."""
        args, clips = self.args, self.clips
        with torch.no_grad():
            view, masks = clips.make(args.batch, 1, args.prompts - 1, (0.5,))
            masks = masks[:, :, 0].flatten(0, 1)
            valid = (masks.flatten(1).sum(1) >= 24).float()
            kind = self.steps_of["image"] % 6
            name = ("box", "box", "point1", "box", "box", "point3")[kind]
            points, labels = clips.boxes(masks) if name == "box" else clips.clicks(masks, int(name[-1]))
            one, less = torch.ones_like(valid), torch.full_like(valid, 0.4)
            first, second = (less, one) if name == "point1" else (one, less)
            inputs = {"view": view[:, 0], "masks": masks, "valid": valid, "points": points, "labels": labels}
            inputs |= {"single": first, "multi": second}
            again = kind in (1, 2)
            if again:
                inputs["noise"] = clips.uniform(0.01, 1, *masks.shape)
        out = self.steps((name, again), self.image_loss, inputs)
        self.note(name, out["iou"])
        if again:
            self.note("again", out["iou_again"])
        self.note("loss_image", out["loss"])

    def image_loss(self, view, masks, valid, points, labels, single, multi, noise=None):
        """Loss of prompts on images; with `noise`, a second try from the first mask and a click on its mistakes."""
        model, target = self.model, shrink(masks)
        features = encode(model, view)
        features.embedding = features.embedding + model.no_memory_embedding.reshape(1, -1, 1, 1)
        features = features.repeat(len(masks) // len(view))
        out = decode(model, features, points, labels, None)
        loss, iou = prompt_loss(out, target, valid, valid, single, multi)
        notes = {"iou": mean_of(iou, valid)}
        if noise is not None:
            with torch.no_grad():
                low, _ = select(model, out, multimask=points.shape[1] == 1)
                found = F.interpolate(low, (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0] > 0
                wrong = found ^ masks
                spot = self.clips.click(wrong, noise)
                x, y = spot[:, 0, 0].long(), spot[:, 0, 1].long()
                label = masks.flatten(1).gather(1, (y * SIZE + x)[:, None]).to(labels.dtype)
            dense = model.prompt_encoder.mask_embed(low.clamp(-32, 32))
            points, labels = torch.cat([points, spot], 1), torch.cat([labels, label], 1)
            second = decode(model, features, points, labels, dense)
            one = torch.ones_like(valid)
            more, iou = prompt_loss(second, target, valid, valid, one, 0.4 * one)
            loss = 0.5 * (loss + more)
            notes["iou_again"] = mean_of(iou, valid)
        return loss, notes

    def clip_step(self, frames: int) -> None:
        """A batch of clips, two objects each: first frame by mask, box or click, the others by memory."""
        args, clips = self.args, self.clips
        with torch.no_grad():
            view, masks = clips.make(args.clips, frames, 2, (0.75, 0.6))  # objects: two of the still, two cut-outs
            ready = (masks[:, :, 0].flatten(2).sum(2) >= 48).float()
            order = (ready * self.prefer * clips.uniform(0.2, 1, *ready.shape)).topk(args.objects, 1).indices
            rows = torch.arange(args.clips, device=self.device)[:, None]
            masks, valid = masks[rows, order].flatten(0, 1), ready[rows, order].flatten()
            kind = ("mask", "box", "mask", "point", "box", "mask", "box")[self.steps_of["clip"] % 7]
            far = self.steps_of["clip"] % 2 == 1  # half of the clips stand for the later part of a longer video
            gap = torch.full((1,), float(torch.randint(0, 60, ())) if far else 0.0, device=self.device)
            span = frames - 1.0 if self.steps_of["clip"] % 4 == 2 else 15.0
            inputs = {"view": view, "masks": masks, "valid": valid}
            inputs |= {"gap": gap, "span": torch.full((1,), span, device=self.device)}
            if kind != "mask":
                points, labels = clips.boxes(masks[:, 0]) if kind == "box" else clips.clicks(masks[:, 0], 1)
                inputs |= {"points": points, "labels": labels}
        out = self.steps((kind, frames), self.clip_loss, inputs)
        for key, value in out.items():
            if key in ("score_ok", "gone_ok"):
                self.note(key, value)
            elif key != "loss":
                self.note(f"{kind}@{key}", value)
        self.note("loss_clip", out["loss"])

    def clip_loss(self, view, masks, valid, gap, span, points=None, labels=None):
        """Loss over all frames of clips, (B, T, 3, H, W) and (N, T, H, W), N = B times the objects of a clip."""
        frames, times = view.shape[1], len(masks) // len(view)
        features = [part.repeat(times) for part in encode(self.model, view.flatten(0, 1)).frames(frames)]
        prompt = masks[:, :1].float() if points is None else None
        decoded, _ = track(self.model, features, points, labels, prompt, span, gap)
        out = Decoded(*(torch.cat([getattr(d, f.name) for d in decoded]) for f in dataclasses.fields(Decoded)))
        masks = masks.transpose(0, 1).flatten(0, 1)  # frame by frame, as the decoded masks
        area = masks.flatten(1).sum(1)
        seen = (area >= 12).float()
        clear = valid.repeat(frames) * ((area >= 12) | (area == 0)).float()  # a few pixels: neither here nor gone
        first = torch.zeros(frames, len(valid), device=self.device)
        first[0] = 1
        first = first.flatten()
        box = first * (points is not None and points.shape[1] == 2)
        loss, iou = prompt_loss(out, shrink(masks), seen, clear, box, 1 - 0.6 * box)
        right = ((out.score[:, 0] > 0) == (seen > 0)).float()
        later = clear * (1 - first)
        notes = {"score_ok": mean_of(right, later), "gone_ok": mean_of(right, later * (1 - seen))}
        for t in (0, 1, frames - 1):
            part = slice(t * len(valid), (t + 1) * len(valid))
            notes[str(t)] = mean_of(iou[part], (clear * seen)[part])
        return loss, notes

    def run(self, out_dir: Path) -> None:
        """Train until the time is up, or until `--stop-after` seconds of this call; write checkpoints on the way."""
        args = self.args
        start, spent_before, saved = time.time(), self.spent, time.time()
        budget = args.minutes * 60
        last, last_step = start, self.step
        self.steps.activate(self.CLIP_ONLY if not self.steps_of["clip"] else ())
        while True:
            self.spent = spent_before + time.time() - start
            share = self.spent / budget
            if share >= 1 or time.time() - start > args.stop_after or (args.steps and self.step >= args.steps):
                break
            curve = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))
            for group in self.optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (self.step + 1) / args.warmup) * curve
            image = self.step % 2 == 0 if args.probe_clips else share < args.image_share or self.step % 4 == 0
            begun = time.time()
            if image:
                self.image_step()
                self.steps_of["image"] += 1
            else:
                if not self.steps_of["clip"]:
                    self.steps.activate(())
                early = share < args.image_share + 0.25 * (1 - args.image_share)
                self.clip_step(args.frames // 2 if early else args.frames)
                self.steps_of["clip"] += 1
            norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
            if self.step % 20 == 0 and not torch.isfinite(norm):
                raise FloatingPointError(f"gradient is {norm.item()} at step {self.step}")
            self.optimizer.step()
            self.step += 1
            with torch.no_grad():
                decay = min(args.ema, (1 + self.step) / (10 + self.step))
                torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
            self.note("norm", norm)
            if args.probe_clips:
                self.wait()
                self.note("ms_image" if image else "ms_clip", torch.tensor(1e3 * (time.time() - begun)))
            if self.step % args.log_every == 0:
                values = {key: round(float(value), 3) for key, value in self.log.items()}
                now = time.time()
                pace = (self.step - last_step) / (now - last)
                last, last_step = now, self.step
                memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0
                print(f"{self.step} {share:.1%} {now - start:.0f}s {pace:.2f}/s {memory:.1f}GiB {values}", flush=True)
            if time.time() - saved > args.save_every:
                self.save(out_dir)
                saved = time.time()
        self.save(out_dir)
        print("steps", self.step, self.steps_of, "spent", round(self.spent), flush=True)

    def save(self, out_dir: Path) -> None:
        """FP16 shards of the averaged weights in `out_dir`, and the whole state in `--state` if given."""
        from safetensors.torch import save_file

        out_dir.mkdir(parents=True, exist_ok=True)
        averaged = dict(zip(self.steps.names, self.average, strict=True))
        tensors = {
            name: averaged.get(name, value).detach().to("cpu", torch.float16).contiguous()
            for name, value in self.model.state_dict().items()
        }
        shards: list[dict[str, Tensor]] = [{}]
        for name, tensor in tensors.items():
            if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > 12 * 2**20:
                shards.append({})
            shards[-1][name] = tensor
        for number, shard in enumerate(shards):
            save_file(shard, out_dir / f"weights-{number}.safetensors")
        info = {
            "steps": self.step,
            "spent_s": round(self.spent),
            **self.steps_of,
            "args": {k: v for k, v in vars(self.args).items() if k != "function"},
        }
        info["log"] = {key: round(float(value), 4) for key, value in self.log.items()}
        (out_dir / "training.json").write_text(json.dumps(info, indent=1, default=str))
        if self.args.state:
            state = {
                "model": self.model.state_dict(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "spent": self.spent,
                "steps_of": self.steps_of,
                "log": self.log,
            }
            partial = f"{self.args.state}.partial"
            torch.save(state, partial)
            os.replace(partial, self.args.state)

    def resume(self, path: Path) -> None:
        """Go on from a whole state, or from a folder of shards (fresh optimiser, time spent from training.json)."""
        if path.is_dir():
            self.model.load_state_dict(read_shards(path), strict=True)
            info = json.loads((path / "training.json").read_text())
            self.step, self.spent = info["steps"], info["spent_s"]
            self.average = [p.detach().clone() for p in self.parameters]
            self.args.warmup = self.step + 100
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step, self.spent = state["average"], state["step"], state["spent"]
        self.steps_of, self.log = state["steps_of"], state["log"]
        self.clips.rng.manual_seed(self.args.seed + 1 + self.step)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's `weights-*.safetensors`, in FP32, under transformers' names."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("weights-*.safetensors")):
        tensors.update({name: tensor.float() for name, tensor in load_file(shard).items()})
    return tensors


def train(args: argparse.Namespace) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False  # trying out kernels costs more than it gains here
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.time()
    pool = Pool(args.data, device, args.limit)
    print(f"data {len(pool.images)} images {len(pool.masks)} masks in {time.time() - start:.1f}s", flush=True)
    trainer = Trainer(args, pool)
    total = sum(p.numel() for p in trainer.model.parameters())
    print(f"model {total / 1e6:.2f} M parameters, ready after {time.time() - start:.1f}s", flush=True)
    if args.resume and args.resume.exists():
        trainer.resume(args.resume)
        print("resumed at step", trainer.step, "spent", round(trainer.spent), flush=True)
    trainer.run(args.out)


# --------------------------------------------------------------------------------------- proof, export and measurements


def selftest(args: argparse.Namespace) -> None:
    """A clip through `track` and through `Sam2VideoModel`'s own session: the same logits, for mask, box and click."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    torch.manual_seed(3)
    model = build_model()
    if args.weights:
        model.load_state_dict(read_shards(args.weights), strict=True)
    reference = copy.deepcopy(model)
    speed_up(model)
    frames, count = 10, 2
    video = torch.randn(frames, 3, SIZE, SIZE) * 0.3 + F.interpolate(torch.randn(frames, 3, 4, 4), (SIZE, SIZE))
    mask = torch.zeros(count, 1, SIZE, SIZE)
    mask[0, :, 40:150, 60:200] = mask[1, :, 120:220, 20:90] = 1
    prompts = {
        "mask": (None, None, mask),
        "box": (boxes_of(mask[:, 0]).view(count, 2, 2), torch.tensor([[2, 3]] * count, dtype=torch.int32), None),
        "click": (torch.tensor([[[120.0, 90]], [[50, 170]]]), torch.ones(count, 1, dtype=torch.int32), None),
    }
    for sign in (1.0, -1.0):  # objects that are seen, and objects that are not
        for either in (model, reference):
            either.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(sign * 3)
        for kind, (points, labels, prompt) in prompts.items():
            with torch.no_grad():
                features = [encode(model, frame[None].expand(count, -1, -1, -1)) for frame in video]
                decoded, chosen = track(
                    model, features, points, labels, prompt, torch.tensor([frames - 1.0]), torch.zeros(1)
                )
            for item in range(count):
                session = Sam2VideoInferenceSession(
                    video=video, video_height=SIZE, video_width=SIZE, dtype=torch.float32
                )
                index = session.obj_id_to_idx(1)
                if prompt is not None:
                    session.add_mask_inputs(index, 0, prompt[item : item + 1])
                else:
                    inputs = {"point_coords": points[item][None, None], "point_labels": labels[item][None, None]}
                    session.add_point_inputs(index, 0, inputs)
                session.obj_with_new_inputs = [1]
                reference(inference_session=session, frame_idx=0)
                worst = 0.0
                for number, out in enumerate(reference.propagate_in_video_iterator(session, start_frame_idx=0)):
                    worst = max(worst, (out.pred_masks[0, 0] - chosen[number][item, 0]).abs().max().item())
                    if number or prompt is None:
                        gap = (out.object_score_logits.flatten()[0] - decoded[number].score[item, 0]).abs().item()
                        worst = max(worst, gap)
                largest = max(low[item].abs().clamp(max=50).max().item() for low in chosen)
                print(
                    f"{kind} item {item} score {sign:+.0f}: worst difference {worst:.1e}, largest logit {largest:.2f}"
                )
                # memory is kept in bfloat16: a last bit that falls the other way shows in a trained model's logits
                assert number == frames - 1 and worst < 1e-3 * max(largest, 1), "track differs from the session"


def export(args: argparse.Namespace) -> None:
    """Write the shards as a folder of transformers: FP16 weights, configuration, processors (they need torchvision)."""
    from transformers import Sam2ImageProcessor, Sam2VideoModel, Sam2VideoProcessor, Sam2VideoVideoProcessor

    model = Sam2VideoModel(build_config())
    model.load_state_dict(read_shards(args.source), strict=True)
    model.half().save_pretrained(args.out)
    size = {"height": SIZE, "width": SIZE}
    image = Sam2ImageProcessor(size=size, mask_size={"height": LOW, "width": LOW})
    processor = Sam2VideoProcessor(image, Sam2VideoVideoProcessor(size=size), target_size=SIZE)
    processor.save_pretrained(args.out)
    image.save_pretrained(args.out)
    print(sorted((path.name, path.stat().st_size) for path in args.out.iterdir()))


def to_pixels(picture: Image.Image) -> Tensor:
    """(3, 256, 256), normalised, as SAM 2's processors do: bilinear with antialiasing, to a square."""
    image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float()[None]
    image = F.interpolate(image, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)[0] / 255
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def measure_images(args: argparse.Namespace) -> None:
    """Ground-truth boxes as prompts: mean IoU over the objects, segm AP (score: predicted IoU)."""
    from pycocotools import mask as mask_utils
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from transformers import Sam2Model

    model = Sam2Model.from_pretrained(args.model, dtype=torch.float32).eval()
    coco = COCO(str(args.data / "instances.json"))
    results, overlaps, clicked = [], [], []
    for number, entry in coco.imgs.items():
        found = [a for a in coco.imgToAnns[number] if not a["iscrowd"]]
        if not found:
            continue
        height, width = entry["height"], entry["width"]
        pixels = to_pixels(Image.open(args.data / "images" / entry["file_name"]))[None]
        xywh = torch.tensor([a["bbox"] for a in found])
        boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        boxes = boxes * torch.tensor([SIZE / width, SIZE / height] * 2)
        truths = np.stack([coco.annToMask(a) for a in found]).astype(bool)
        with torch.no_grad():
            out = model(pixel_values=pixels, input_boxes=boxes[None], multimask_output=False)
            logits = F.interpolate(out.pred_masks[0], (height, width), mode="bilinear", align_corners=False)
            inside = []
            for truth in truths:  # the click: the inside point farthest from the border, in the model's pixels
                y, x = deepest(truth)
                inside.append([(x + 0.5) * SIZE / width - 0.5, (y + 0.5) * SIZE / height - 0.5])
            points = torch.tensor(inside)[None, :, None]
            click = model(pixel_values=pixels, input_points=points, input_labels=torch.ones(points.shape[:3]).int())
            best = click.pred_masks[0][torch.arange(len(found)), click.iou_scores[0].argmax(1)]
            best = F.interpolate(best[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0] > 0
        masks = (logits[:, 0] > 0).numpy()
        for annotation, truth, mask, other, score in zip(found, truths, masks, best.numpy(), out.iou_scores[0, :, 0]):
            overlaps.append((mask & truth).sum() / max((mask | truth).sum(), 1))
            clicked.append((other & truth).sum() / max((other | truth).sum(), 1))
            code = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
            results.append(
                {
                    "image_id": number,
                    "category_id": annotation["category_id"],
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                    "score": float(score),
                }
            )
    evaluation = COCOeval(coco, coco.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    print(f"objects {len(overlaps)}  box mIoU {np.mean(overlaps):.4f}  one-click mIoU {np.mean(clicked):.4f}")
    print(f"segm AP {evaluation.stats[0]:.4f}  AP50 {evaluation.stats[1]:.4f}")


def deepest(mask: np.ndarray) -> tuple[int, int]:
    """Row and column of the pixel of a mask that lies farthest from its border."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return int(row), int(column)


def boundary_f(found: np.ndarray, true: np.ndarray) -> float:
    """DAVIS's contour measure F: precision and recall of boundary pixels within 0.8 % of the image's diagonal."""
    from scipy.ndimage import binary_dilation

    def edge(mask: np.ndarray) -> np.ndarray:  # as davis2017's seg2bmap at full size
        east, south, both = mask.copy(), mask.copy(), mask.copy()
        east[:, :-1], south[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        out = (mask ^ east) | (mask ^ south) | (mask ^ both)
        out[-1], out[:, -1], out[-1, -1] = (mask ^ east)[-1], (mask ^ south)[:, -1], False
        return out

    radius = math.ceil(0.008 * np.linalg.norm(true.shape))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    ours, theirs = edge(found), edge(true)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (ours & binary_dilation(theirs, disk)).sum() / ours.sum()
    recall = (theirs & binary_dilation(ours, disk)).sum() / theirs.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def measure_video(args: argparse.Namespace) -> None:
    """Follow the object of every DAVIS sequence from its first frame; J and F without the first and the last frame."""
    from transformers import Sam2VideoModel
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    model = Sam2VideoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = []
    for folder in sorted((args.data / "JPEGImages").iterdir()):
        paths = sorted(folder.glob("*.jpg"))[: args.frames or None]
        truths = [np.array(Image.open(args.data / "Annotations" / folder.name / f"{p.stem}.png")) == 1 for p in paths]
        video = torch.stack([to_pixels(Image.open(path)) for path in paths])
        shape = truths[0].shape
        first = F.interpolate(
            torch.tensor(truths[0])[None, None].float(), (SIZE, SIZE), mode="bilinear", antialias=True
        )
        scores = {}
        for kind in args.prompts:
            session = Sam2VideoInferenceSession(
                video=video, video_height=shape[0], video_width=shape[1], dtype=torch.float32
            )
            index = session.obj_id_to_idx(1)
            if kind == "mask":
                session.add_mask_inputs(index, 0, (first >= 0.5).float())
            elif kind == "box":
                box = boxes_of(torch.tensor(truths[0])[None].to(torch.uint8))
                box = box * torch.tensor([SIZE / shape[1], SIZE / shape[0]] * 2)
                labels = torch.tensor([[[2, 3]]], dtype=torch.int32)
                session.add_point_inputs(index, 0, {"point_coords": box.view(1, 1, 2, 2), "point_labels": labels})
            if kind != "copy":
                session.obj_with_new_inputs = [1]
                model(inference_session=session, frame_idx=0)
                low = [out.pred_masks for out in model.propagate_in_video_iterator(session, start_frame_idx=0)]
                large = F.interpolate(torch.cat(low), shape, mode="bilinear", align_corners=False)[:, 0]
                found = list((large > 0).numpy())
            else:
                found = [truths[0]] * len(truths)
            inner = list(zip(found, truths, strict=True))[1:-1]
            j = [(a & b).sum() / max((a | b).sum(), 1) if (a | b).any() else 1.0 for a, b in inner]
            f = [boundary_f(a, b) for a, b in inner]
            scores[kind] = (float(np.mean(j)), float(np.mean(f)), float(np.mean(j[-8:])))
            start = (found[0] & truths[0]).sum() / (found[0] | truths[0]).sum()
            late = np.mean(j[-8:])
            print(
                f"{folder.name:20s} {kind:5s} J {np.mean(j):.3f} F {np.mean(f):.3f}",
                f"first frame {start:.3f} last eight {late:.3f}",
                flush=True,
            )
        rows.append(scores)
    for kind in args.prompts:
        j, f, late = np.mean([row[kind] for row in rows], axis=0)
        print(
            f"{kind:5s} J {100 * j:.1f}  F {100 * f:.1f}  J&F {50 * (j + f):.1f}  last eight frames J {100 * late:.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, function, **paths) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=(function.__doc__ or name).splitlines()[0])
        for path, nargs in paths.items():
            sub.add_argument(path, type=Path, nargs=nargs)
        sub.set_defaults(function=function)
        return sub

    sub = command("pack", lambda a: pack(a.out, a.folders, a.size, a.quality), out=None, folders="+")
    sub.add_argument("--size", type=int, default=320, help="side of the stored squares, px")
    sub.add_argument("--quality", type=int, default=75, help="of WebP")
    sub = command("selftest", selftest)
    sub.add_argument("--weights", type=Path, help="a folder of shards instead of the random start")
    sub = command("train", train, data=None, out=None)
    sub.add_argument("--minutes", type=float, default=10.5, help="length of the whole schedule")
    sub.add_argument(
        "--stop-after", type=float, default=1e9, help="seconds of this call; the schedule goes on with --resume"
    )
    sub.add_argument("--resume", type=Path, help="a --state file, or a folder of shards; ignored if it is not there")
    sub.add_argument("--state", help="write the whole training state here as well")
    sub.add_argument("--image-share", type=float, default=0.45, help="share of the time for single images only")
    sub.add_argument("--batch", type=int, default=64, help="images a step")
    sub.add_argument("--prompts", type=int, default=12, help="objects an image")
    sub.add_argument("--clips", type=int, default=32, help="clips a step")
    sub.add_argument("--objects", type=int, default=2, help="objects a clip")
    sub.add_argument("--frames", type=int, default=8, help="frames a clip (half as many at first)")
    sub.add_argument("--lr", type=float, default=1e-3)
    sub.add_argument("--warmup", type=int, default=200, help="steps")
    sub.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights")
    sub.add_argument("--save-every", type=float, default=120, help="seconds")
    sub.add_argument("--log-every", type=int, default=50, help="steps")
    sub.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by time)")
    sub.add_argument("--limit", type=int, default=0, help="use only so many images")
    sub.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
    sub.add_argument("--probe-clips", action="store_true", help="alternate both kinds of steps from the start")
    sub.add_argument("--seed", type=int, default=0)
    command("export", export, source=None, out=None)
    command("images", measure_images, model=None, data=None)
    sub = command("video", measure_video, model=None, data=None)
    sub.add_argument("--prompts", nargs="+", default=["mask", "box", "copy"], choices=["mask", "box", "copy"])
    sub.add_argument("--frames", type=int, default=0, help="only so many of each sequence (0: all)")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
