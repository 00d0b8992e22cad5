"""Losses, steps (one graph each on a GPU) and the schedule of training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.train_sam2.clips import ClipMaker, Pool
from tools.train_sam2.model import LOW, SIZE, Decoded, build_model, decode, encode, select, speed_up, track


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
