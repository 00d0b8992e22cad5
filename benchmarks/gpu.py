"""The image encoder on a GPU: integers (carsam.runtime) beside compiled bfloat16.

    python -m benchmarks.gpu --budget 120 --output gpu.jsonl

Weights are random, drawn as PyTorch does: times and memory do not depend on them. Ranges come from one image. Every
subject is compiled block by block and prints a first time as soon as it has one; then all are timed in turn until the
budget is nearly used, and the last table holds the medians. Differences are ‖ours − simulated‖ / ‖simulated‖ of the
embeddings of the ranges' image, the simulated model in float32; beside them the same for the simulated model after
its input moved by a thousandth: how far a model of rounded values is moved by what is too small to matter.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import carsam
from carsam.bits.plan import BitPlan
from carsam.calibrate.observers import RangeRecorder
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.models.sam.random import SIZES, random_sam
from carsam.quantizers import ActivationQuantizer, SiteQuantizer, UniformSoftmax
from carsam.runtime.convert import integer_linears
from carsam.runtime.cuda import compile_blocks, lower

STARTED = time.monotonic()


class FloatAttention(nn.Module):
    """SAM's encoder attention in floating point, relative positions looked up once, by one of three routes.

    Args:
        source: transformers' attention; its Linears are taken over, or replaced later.
        route: ``eager`` (transformers' default arithmetic), ``sdpa`` (its other choice: the bias is built and given to
            scaled_dot_product_attention) or ``flex`` (flex_attention, where no map of scores or biases is built).
    """

    def __init__(self, source: nn.Module, route: str):
        super().__init__()
        self.qkv, self.proj, self.route = source.qkv, source.proj, route
        self.heads, self.scaling = source.num_attention_heads, source.scale
        sides = [(len(table) + 1) // 2 for table in (source.rel_pos_h, source.rel_pos_w)]
        self.register_buffer("positions_h", source.get_rel_pos(sides[0], sides[0], source.rel_pos_h).detach())
        self.register_buffer("positions_w", source.get_rel_pos(sides[1], sides[1], source.rel_pos_w).detach())

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """(batch, height, width, channels) → the same."""
        batch, height, width, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, height * width, 3, self.heads, -1)
        grid = qkv[:, :, 0].unflatten(1, (height, width))
        rel_h = torch.einsum("bhwnc,hkc->bnhwk", grid, self.positions_h).flatten(2, 3)
        rel_w = torch.einsum("bhwnc,wkc->bnhwk", grid, self.positions_w).flatten(2, 3)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.route == "flex":
            from torch.nn.attention.flex_attention import flex_attention

            def with_positions(score, b, h, q, k):
                return score + rel_h[b, h, q, k // width] + rel_w[b, h, q, k % width]

            out = flex_attention(query, key, value, score_mod=with_positions, scale=self.scaling)
        else:
            bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
            if self.route == "sdpa":
                out = nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=self.scaling)
            else:
                scores = (query * self.scaling) @ key.transpose(-2, -1) + bias
                out = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, -1)), None


def floating(model: nn.Module, route: str, dtype: torch.dtype) -> nn.Module:
    """A float encoder with one route of attention."""
    encoder = copy.deepcopy(model.vision_encoder)
    for block in encoder.layers:
        block.attn = FloatAttention(block.attn, route)
    lower(encoder, dtype)
    return encoder


def quantized(model: nn.Module, bits: str, pixels: Tensor, attention: bool) -> nn.Module:
    """A simulated model by nearest rounding; without ``attention`` its MatMuls stay in floating point.

    Returns:
        The model in float32, which always quantizes.
    """
    model = copy.deepcopy(model)
    sites = find_sites(model)
    overrides = {} if attention else {f"*.{which}": "w8a16" for which in ("query", "key", "value", "probs")}
    plan = BitPlan.parse(bits, overrides)

    # The encoder alone is measured: what the decoder would see is not observed.
    def quantizer(site: str, width: int, role: str) -> ActivationQuantizer:
        return ActivationQuantizer(16 if sites.in_decoder(site) else width)

    def softmax(site: str, width: int) -> UniformSoftmax:
        return UniformSoftmax(16 if sites.in_decoder(site) else width)

    prepare_model(model, sites, plan, quantizer, softmax)
    model.to(pixels.device)
    recorder = RangeRecorder([model.vision_encoder])
    with recorder.recording():
        model.vision_encoder(pixels)
    recorder.apply("min-max")
    for site in sites.layers:
        layer = model.get_submodule(site.name)
        layer.fit_weight("min-max")
        layer.freeze()
    for module in model.modules():
        if isinstance(module, SiteQuantizer):
            module.always = True
    return model.to(pixels.device)


def on_integers(simulated: nn.Module, dtype: torch.dtype, *, packed: bool, route: str | None = None) -> nn.Module:
    """The encoder of a simulated model on integers; ``route`` for attentions that stay in floating point."""
    model = copy.deepcopy(simulated)
    integer_linears(model, packed=packed)
    encoder = model.vision_encoder
    if route is not None:
        for block in encoder.layers:
            block.attn = FloatAttention(block.attn, route)
    lower(encoder, dtype)
    return encoder


class Bench:
    """Builds, compiles and times subjects within a budget of seconds.

    Args:
        arguments: Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.device, self.budget = torch.device(arguments.device), arguments.budget
        self.compiled = arguments.compile
        self.output: Path | None = arguments.output
        self.subjects: dict[str, tuple[nn.Module, Tensor]] = {}
        self.times: dict[str, list[float]] = {}
        self.facts: dict[str, dict[str, object]] = {}

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - STARTED)

    def say(self, kind: str, **fields: object) -> None:
        """Prints a line, and appends it to the output file as JSON, at once."""
        text = "  ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items()
        )
        print(f"[{time.monotonic() - STARTED:5.1f} s] {kind}: {text}", flush=True)
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "seconds": time.monotonic() - STARTED, **fields}) + "\n")

    def once(self, name: str) -> float:
        """Milliseconds of one pass."""
        encoder, pixels = self.subjects[name]
        with torch.no_grad():
            if self.device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                encoder(pixels)
                end.record()
                end.synchronize()
                return start.elapsed_time(end)
            began = time.perf_counter()
            encoder(pixels)
            return 1e3 * (time.perf_counter() - began)

    def add(self, name: str, build: Callable[[], nn.Module], pixels: Tensor, needs: float) -> nn.Module | None:
        """Builds and compiles a subject, and prints its first time; None (and a line that says so) where it fails.

        Args:
            name: Of its row.
            build: Gives the encoder.
            pixels: Its input.
            needs: Seconds without which it is not begun.
        """
        if self.left < needs:
            self.say("left out", subject=name, why=f"{self.left:.0f} s of the budget left, {needs:.0f} wanted")
            return None
        try:
            encoder = build().eval()
            if self.compiled:
                compile_blocks(encoder)
            self.subjects[name] = encoder, pixels
            began = time.monotonic()
            self.once(name)
            compiled = time.monotonic() - began
            self.once(name)
            resident = sum(t.numel() * t.element_size() for t in (*encoder.parameters(), *encoder.buffers())) / 2**20
            peak = float("nan")
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            first = statistics.median(self.once(name) for _ in range(3))
            if self.device.type == "cuda":
                peak = resident + (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as error:  # a benchmark of many subjects goes on without one, and says which
            self.subjects.pop(name, None)
            self.say("failed", subject=name, error=f"{type(error).__name__}: {str(error)[:600]}")
            return None
        self.times[name] = []
        self.facts[name] = {"weights_mib": resident, "peak_mib": peak}
        self.say("first time", subject=name, ms=first, compile_s=compiled, weights_mib=resident, peak_mib=peak)
        return encoder

    def interleave(self, rounds: int) -> None:
        """Times all subjects in turn."""
        for _ in range(rounds):
            if self.left < 2:
                break
            for name in self.subjects:
                self.times[name].append(self.once(name))

    def table(self, batch: int) -> None:
        """The medians, beside the fastest floating-point subject and the first."""
        floats = [name for name in self.times if name.startswith("float") and self.times[name]]
        medians = {name: statistics.median(times) for name, times in self.times.items() if times}
        first = medians[floats[0]] if floats else float("nan")
        best = min((medians[name] for name in floats), default=float("nan"))
        print("\n| encoder | ms | ms an image | against the first | against the fastest float | weights | peak |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, ms in medians.items():
            facts = self.facts[name]
            sizes = f"{facts['weights_mib']:.0f} MiB | {facts['peak_mib']:.0f} MiB"
            print(f"| {name} | {ms:.1f} | {ms / batch:.2f} | {first / ms:.2f}× | {best / ms:.2f}× | {sizes} |")
        print(flush=True)
        for name, ms in medians.items():
            spread = [min(self.times[name]), max(self.times[name])]
            self.say("median", subject=name, ms=ms, repeats=len(self.times[name]), least=spread[0], most=spread[1])


def difference(encoder: nn.Module, simulated: Tensor, pixels: Tensor) -> float:
    """‖ours − simulated‖ / ‖simulated‖ of the first image's embeddings, in a batch as compiled."""
    with torch.no_grad():
        ours = encoder(pixels).last_hidden_state[:1].float()
    return float((ours - simulated).norm() / simulated.norm())


def kernels(bench: Bench, name: str, most: int = 10) -> None:
    """Says which kernels one pass of a subject spends its time in."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        bench.once(name)
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:most]
    for event in events:
        ms = event.self_device_time_total / 1000
        bench.say("kernel", subject=name, ms=ms, calls=event.count, kernel=event.key[:90])


def exactness(bench: Bench, bits: str, source: nn.Module, pixels: Tensor) -> None:
    """Compares every block in float32 on the inputs that it has in the simulated model: only kernels differ then."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append(out)

    hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in source.vision_encoder.layers]
    try:
        with torch.no_grad():
            source.vision_encoder(pixels)
            for hook in hooks:
                hook.remove()
            encoder = on_integers(source, torch.float32, packed=True)
            # What a block adds: its input passes by unchanged.
            pairs = [(block(x), y, x) for block, x, y in zip(encoder.layers, inputs, outputs)]
        errors = [float((ours - theirs).norm() / (theirs - x).norm()) for ours, theirs, x in pairs]
    except Exception as error:  # as in Bench.add
        bench.say("failed", subject=f"exactness {bits}", error=f"{type(error).__name__}: {str(error)[:600]}")
        return
    bench.say("blocks in float32", bits=bits, median=statistics.median(errors), most=max(errors))


def products(bench: Bench, model: nn.Module, rows: int) -> None:
    """Times the four Linears of a block alone: bfloat16, and ours; says where an encoder's time can come from."""
    from carsam.runtime.kernels import linear

    widths = model.config.vision_config
    shapes = {"qkv": (3 * widths.hidden_size, widths.hidden_size), "proj": (widths.hidden_size, widths.hidden_size)}
    shapes |= {"lin1": (widths.mlp_dim, widths.hidden_size), "lin2": (widths.hidden_size, widths.mlp_dim)}
    for name, (n, k) in shapes.items():
        a = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=bench.device)
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=bench.device)
        x, y = a.bfloat16(), w.bfloat16()
        scale, offset = torch.rand(n, device=bench.device), torch.zeros(n, dtype=torch.int32, device=bench.device)
        out = torch.empty(rows, n, dtype=torch.bfloat16, device=bench.device)
        sums = torch.zeros(rows, dtype=torch.int32, device=bench.device)
        rest = scale, offset, scale, offset, sums, None, None  # with everything that 8 bits need
        linear.run(a, w, out, *rest)
        calls = {
            "bf16_ms": lambda x=x, y=y: x @ y.t(),
            "ours_ms": lambda a=a, w=w, out=out, rest=rest: linear.run(a, w, out, *rest),
            "cublas_int32_ms": lambda a=a, w=w: torch._int_mm(a, w.t()),
        }
        found = {}
        for label, call in calls.items():
            call()
            times = []
            for _ in range(10):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            found[label] = statistics.median(times)
        bench.say("product", layer=name, rows=rows, n=n, k=k, **found, tile=str(linear.fastest(a, w, out, *rest)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="vit-h", choices=list(SIZES))
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--blocks", type=int, help="only so many blocks")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20, help="rounds of the interleaved timing, at most")
    parser.add_argument("--budget", type=float, default=120, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="JSON lines, one as soon as a thing is known")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    arguments = parser.parse_args()
    print(shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]))
    bench = Bench(arguments)
    device, cuda = bench.device, bench.device.type == "cuda"
    bench.say(
        "machine",
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if cuda else "CPU",
        carsam=carsam.__version__,
        size=arguments.size,
        batch=arguments.batch,
        image_size=arguments.image_size,
    )
    model = random_sam(arguments.size, arguments.image_size, blocks=arguments.blocks).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, 3, arguments.image_size, arguments.image_size)
    pixels = torch.randn(shape, generator=generator).to(device)
    dtype = torch.bfloat16
    batch = pixels.to(dtype)
    bench.say("built", parameters=sum(p.numel() for p in model.parameters()))

    simulated: dict[str, nn.Module] = {}
    for bits in ("w8a8", "w4a4"):
        simulated[bits] = quantized(model, bits, pixels[:1], True)
    bench.say("quantized", bits="w8a8, w4a4")

    def integers(bits: str, name: str, needs: float, **options: object) -> None:
        source = simulated[bits] if "route" not in options else quantized(model, bits, pixels[:1], False)
        encoder = bench.add(name, lambda: on_integers(source, dtype, **options), batch, needs)
        if encoder is None:
            return
        if "route" in options:
            return
        with torch.no_grad():
            expected = source.vision_encoder(pixels[:1]).last_hidden_state
            moved = source.vision_encoder(pixels[:1] * (1 + 1e-3 * torch.randn_like(pixels[:1]))).last_hidden_state
            plain = float_outputs.setdefault("float", model.vision_encoder(pixels[:1]).last_hidden_state)
        bench.say(
            "difference",
            subject=name,
            to_simulated=difference(encoder, expected, batch),
            simulated_moved=float((moved - expected).norm() / expected.norm()),
            simulated_to_float=float((expected - plain).norm() / plain.norm()),
        )

    float_outputs: dict[str, Tensor] = {}
    first = bench.add("float bf16, sdpa attention", lambda: floating(model, "sdpa", dtype), batch, 10)
    if first is not None:
        with torch.no_grad():
            plain = float_outputs.setdefault("float", model.vision_encoder(pixels[:1]).last_hidden_state)
        bench.say("difference", subject="float bf16, sdpa attention", to_float=difference(first, plain, batch))
    integers("w8a8", "ours W8A8", 10, packed=True)
    integers("w4a4", "ours W4A4, packed weights", 10, packed=True)
    bench.add("float bf16, eager attention", lambda: floating(model, "eager", dtype), batch, 12)
    if cuda:
        rows = arguments.batch * (arguments.image_size // 16) ** 2
        if bench.left > 15:
            try:
                products(bench, model, rows)
            except Exception as error:  # as in Bench.add
                bench.say("failed", subject="products", error=f"{type(error).__name__}: {str(error)[:600]}")
        bench.add("float bf16, flex attention", lambda: floating(model, "flex", dtype), batch, 18)
        integers("w8a8", "ours W8A8 Linears, flex attention in bf16", 18, packed=True, route="flex")
    else:
        integers("w8a8", "ours W8A8 Linears, sdpa attention", 10, packed=True, route="sdpa")
    integers("w4a4", "ours W4A4, weights in bytes", 14, packed=False)
    bench.interleave(arguments.repeats)
    bench.table(arguments.batch)
    for name in bench.subjects if cuda else ():
        if bench.left > 3:
            kernels(bench, name)
    for bits, source in simulated.items():
        if bench.left > 15:
            exactness(bench, bits, source, pixels[:1])
    bench.say("done")
    return 0 if bench.times else 1


if __name__ == "__main__":
    sys.exit(main())
