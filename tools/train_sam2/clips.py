"""Training data: COCO-form folders in one file, and clips that are made of still images."""

from __future__ import annotations

import io
import json
import lzma
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tools.train_sam2.model import SIZE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, SAM 2's normalisation


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
