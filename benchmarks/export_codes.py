"""Whether an exported pair computes the arithmetic of the simulation, layer by layer, and where the two part.

    python benchmarks/export_codes.py PACKED --images IMAGES --coco instances.json --limit 10

Three ways to compute the same packed model are set against its files on ONNX Runtime, on the same pixels and boxes:

- *simulated*: PyTorch on decoded values, as carsam evaluates;
- *simulated, exact sums*: PyTorch, but every layer and attention sums products of codes, which has no rounding at all;
- *the same between ONNX Runtime's operators*: these exact layers and attentions, with everything between them (norms,
  GELU, softmax, resizing) computed by ONNX Runtime, operator by operator as in the file.

The first two differ from the files in the last bit of norms, GELU and softmax, a few codes fall to the other side of a
rounding, and the masks drift apart. The third does not, if the files are right: then all codes and masks are equal.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from export_masks import ious, parsed, prompted, simulated
from onnx import helper
from torch import Tensor, nn

from carsam.data.images.transforms import Preprocessor
from carsam.export.attention import Call
from carsam.export.graph import DOMAINS, IR_VERSION
from carsam.export.markers import ATTENTION, DOMAIN
from carsam.export.trace import call_of, lower, site_of, trace_marks
from carsam.models.attention import MatMulQuantizers
from carsam.models.family import family_of
from carsam.pack.checkpoint import open_model
from carsam.pack.layers import PackedLayer
from carsam.quantizers import ActivationQuantizer, UniformSoftmax
from carsam.runtime.halves import Halves
from carsam.runtime.onnx import onnx_halves

Arrays = dict[str, np.ndarray]
Softmax = Callable[[Tensor], Tensor]
# Scores (..., keys) as (..., rows, columns) of the key's map, and what is added to them there.
Placed = tuple[Tensor, tuple[int, int]]


def differences(x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """Codes of x less the code of zero, in float64, where sums and products of them are exact."""
    return quantizer.encode(x).double() - float(quantizer.zero_point)


def step(*scales: Tensor | float) -> Tensor:
    """Product of steps as ONNX Runtime takes it, in float32."""
    left, right = (torch.as_tensor(scale, dtype=torch.float32) for scale in scales)
    return left * right


def exact_layer(layer: PackedLayer, x: Tensor) -> Tensor:
    """A packed Linear or Conv2d from exact sums, rounded to float32, times the steps, plus the bias."""
    codes = differences(x, layer.input_quantizer)
    shape = (-1, *[1] * (len(layer.shape) - 1))
    weight = layer.integer_weight().double() - layer.weight_zero_point.double().view(shape)
    scale = step(layer.input_quantizer.scale, layer.weight_scale)
    if layer.conv is None:
        total, last = F.linear(codes, weight), (-1,)
    else:
        total, last = F.conv2d(codes, weight, **layer.conv), (-1, 1, 1)
    values = total.float() * scale.view(last)
    return values if layer.bias is None else values + layer.bias.view(last)


def exact_attention(
    matmul: MatMulQuantizers,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    added: Sequence[Tensor | Placed],
    softmax: Softmax,
) -> Tensor:
    """The core of an attention from exact sums; ``added`` is added to the scores, one after the other."""
    scores = differences(query, matmul.query) @ differences(key, matmul.key).transpose(-2, -1)
    scores = scores.float() * step(float(matmul.query.scale) * scaling, matmul.key.scale)
    for each in added:
        if isinstance(each, tuple):
            values, sides = each
            scores = (scores.unflatten(-1, sides) + values).flatten(-2)
        else:
            scores = scores + each
    probs = matmul.probs.quantizer
    codes = differences(softmax(scores), probs)
    return (codes @ differences(value, matmul.value)).float() * step(probs.scale, matmul.value.scale)


def is_exact(site: nn.Module) -> bool:
    """Whether a site is one that the functions above compute; the others stay ONNX Runtime's."""
    if isinstance(site, MatMulQuantizers):
        operands = (site.query, site.key, site.value)
        uniform = all(isinstance(each, ActivationQuantizer) and each.bits <= 8 for each in operands)
        return uniform and isinstance(site.probs, UniformSoftmax) and site.probs.bits <= 8
    plain = isinstance(site, PackedLayer) and isinstance(site.input_quantizer, ActivationQuantizer)
    return plain and site.input_quantizer.bits <= 8 and (site.conv is None or site.conv["groups"] == 1)


def relative_terms(relative: tuple[Tensor, Tensor] | None, lead: Sequence[int]) -> list[Placed]:
    """Relative positions for :func:`exact_attention`: each with the sides of the key's map."""
    if relative is None:
        return []
    rows, columns = (each.reshape(*lead, each.shape[-1]) for each in relative)
    sides = rows.shape[-1], columns.shape[-1]
    return [(rows[..., :, None], sides), (columns[..., None, :], sides)]


def with_exact_sums(model: nn.Module) -> nn.Module:
    """A copy of a packed model whose layers and attentions compute from exact sums, in PyTorch."""
    made = copy.deepcopy(model)
    soft = partial(torch.softmax, dim=-1)

    def attend(matmul, query, key, value, scaling, mask=None):
        return exact_attention(matmul, query, key, value, scaling, [] if mask is None else [mask], soft), None

    def attend_grid(matmul, query, key, value, scaling, relative):
        return exact_attention(matmul, query, key, value, scaling, relative_terms(relative, query.shape[:-1]), soft)

    for module in made.modules():
        if isinstance(module, PackedLayer) and is_exact(module):
            module.forward = partial(exact_layer, module)
        elif isinstance(module, MatMulQuantizers) and is_exact(module):
            module.attend, module.attend_grid = partial(attend, module), partial(attend_grid, module)
    return made


def session(nodes: list, constants: list, inputs: Arrays, outputs: list[str]) -> onnxruntime.InferenceSession:
    """Nodes as a model of their own, optimised as a whole file is."""
    described = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in inputs.items()
    ]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(nodes, "part", described, results, constants)
    opsets = [helper.make_opsetid(domain, version) for domain, version in DOMAINS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Interpreted:
    """A traced half: exact layers and attentions in PyTorch, ONNX Runtime for the stretches between them."""

    def __init__(self, graph: onnx.GraphProto, sites: Mapping[str, nn.Module]):
        self.outputs = [each.name for each in graph.output]
        self.sites, self.sessions, self.softmaxes = sites, {}, {}
        constants = list(graph.initializer)
        self.parts: list = [[]]
        for node in graph.node:
            if node.domain != DOMAIN:
                self.parts[-1].append(node)
            elif is_exact(sites[site_of(node)]):
                self.parts += [node, []]
            else:
                stretch, _ = lower(node, sites[site_of(node)])
                self.parts[-1] += stretch.nodes
                constants += stretch.constants
        self.constants = {each.name: each for each in constants}
        self.codes: dict[str, np.ndarray] = {}

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        """Outputs in order; ``codes`` are then those of every layer's input."""
        known = dict(inputs)
        for number, part in enumerate(self.parts):
            if isinstance(part, list):
                known |= self._between(number, part, known)
            else:
                known[part.output[0]] = self._site(part, known)
        return [known[name] for name in self.outputs]

    def _between(self, number: int, nodes: list, known: Arrays) -> Arrays:
        made = {name for node in nodes for name in node.output}
        if not made:
            return {}
        if number not in self.sessions:
            read = {name for node in nodes for name in node.input}
            following = (part if isinstance(part, list) else [part] for part in self.parts[number + 1 :])
            later = {name for part in following for node in part for name in node.input}
            wanted = sorted(made & (later | set(self.outputs)))
            given = {name: known[name] for name in sorted(read) if name in known}
            constants = [self.constants[name] for name in sorted(read) if name in self.constants]
            self.sessions[number] = session(nodes, constants, given, wanted), list(given), wanted
        opened, given, wanted = self.sessions[number]
        return dict(zip(wanted, opened.run(wanted, {name: known[name] for name in given})))

    def _site(self, mark: onnx.NodeProto, known: Arrays) -> np.ndarray:
        name = site_of(mark)
        site, tensors = self.sites[name], [torch.from_numpy(known[each]) for each in mark.input]
        if mark.op_type != ATTENTION:
            self.codes[name] = site.input_quantizer.encode(tensors[0]).numpy()
            return exact_layer(site, tensors[0]).numpy()
        call: Call = call_of(mark)
        query, key, value, *more = tensors
        added = relative_terms(tuple(more), query.shape[:-1]) if len(more) == 2 else more
        return exact_attention(site, query, key, value, call.scaling, added, self._softmax).numpy()

    def _softmax(self, scores: Tensor) -> Tensor:
        """ONNX Runtime's, whose exponentials are not PyTorch's to the last bit."""
        if "softmax" not in self.sessions:
            node = helper.make_node("Softmax", ["x"], ["y"], axis=-1)
            self.sessions["softmax"] = session([node], [], {"x": scores.numpy()}, ["y"])
        return torch.from_numpy(self.sessions["softmax"].run(["y"], {"x": scores.contiguous().numpy()})[0])


class Codes:
    """Codes of every layer's input in a model, as it ran last."""

    def __init__(self, model: nn.Module):
        self.found: dict[str, np.ndarray] = {}
        for name, module in model.named_modules():
            if isinstance(module, PackedLayer) and is_exact(module):
                module.input_quantizer.register_forward_pre_hook(partial(self._keep, name))
                if isinstance(module.forward, partial):
                    module.forward = partial(self._kept, name, module)

    def _keep(self, name: str, quantizer: nn.Module, inputs: tuple) -> None:
        self.found[name] = quantizer.encode(inputs[0]).numpy()

    def _kept(self, name: str, layer: PackedLayer, x: Tensor) -> Tensor:
        self.found[name] = layer.input_quantizer.encode(x).numpy()
        return exact_layer(layer, x)


def main() -> None:
    arguments = parsed(__doc__)
    model = open_model(arguments.model).eval().requires_grad_(False)
    preprocess = Preprocessor.for_model(model)
    marked = trace_marks(model, family_of(model))
    halves = [Interpreted(graph, marked.sites) for graph in (marked.encoder, marked.decoder)]
    exact = with_exact_sums(model)
    simulations = {"simulated": model, "simulated, exact sums": exact}
    codes = {name: Codes(each) for name, each in simulations.items()}
    interpreted = "the same between ONNX Runtime's operators"
    agreement: dict[str, list[float]] = {name: [] for name in (*simulations, interpreted)}
    equal: list[bool] = []
    drift: dict[str, dict[str, list[float]]] = {name: {} for name in simulations}
    with tempfile.TemporaryDirectory() as folder:
        files = onnx_halves(copy.deepcopy(model), folder=Path(folder))
        for pixels, _, boxes in prompted(arguments.coco, arguments.images, preprocess, arguments.limit):
            expected = masks_of(files, pixels, boxes)
            own = Halves(halves[0], halves[1], files.shapes, files.mask_side, interpreted, files.box_ends_in_no_point)
            found = masks_of(own, pixels, boxes)
            agreement[interpreted] += ious(found, expected)
            equal.append(torch.equal(found, expected))
            reference = {**halves[0].codes, **halves[1].codes}
            for name, each in simulations.items():
                with torch.no_grad():
                    logits = simulated(each, pixels, boxes)
                agreement[name] += ious(logits, expected)
                for site, values in codes[name].found.items():
                    if site in reference and reference[site].shape == values.shape:
                        drift[name].setdefault(site, []).append(float((values != reference[site]).mean()))
    boxes_seen = len(agreement[interpreted])
    print(f"{arguments.model}: {boxes_seen} boxes on {len(equal)} images\n")
    print("| compared with the exported files | mean IoU | worst | logits equal to the last bit |")
    print("| --- | --- | --- | --- |")
    for name, values in agreement.items():
        same = f"{sum(equal)} of {len(equal)} images" if name == interpreted else ""
        print(f"| {name} | {np.mean(values):.4f} | {min(values):.3f} | {same} |")
    print("\n| codes that differ at the input of | " + " | ".join(simulations) + " |")
    print("| --- | " + "--- | " * len(simulations))
    sites = list(drift["simulated"])
    for site in dict.fromkeys(sites[i] for i in np.linspace(0, len(sites) - 1, 16).astype(int)):
        print(f"| `{site}` | " + " | ".join(f"{100 * np.mean(drift[name][site]):.4f} %" for name in simulations) + " |")


def masks_of(halves: Halves, pixels: Tensor, boxes: Tensor) -> Tensor:
    """Logits (B, h, w) of the single masks."""
    logits, _ = halves.all_masks(halves.encode_image(pixels), boxes=boxes)
    return logits[:, 0]


if __name__ == "__main__":
    main()
