"""A budget becomes the bits of a packed model: it is kept to, and what cannot be met names what can."""

from collections import Counter

import pytest
import torch
from small_models import small_model

import carsam
from carsam.bits.allocation import BudgetError
from carsam.bits.plan import BitPlan
from carsam.commands.recipe import quantize_config
from carsam.config import QuantizeConfig
from carsam.methods.base import create
from carsam.methods.car_sam_plus import CarSamPlus
from carsam.models.family import family_of, find_sites
from carsam.models.sites import OPERANDS
from carsam.pack.folder import RECIPE
from carsam.prompts import image as prompted
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage
from carsam.quantizers import SiteQuantizer, SoftmaxQuantizer
from carsam.reading import read_yaml
from carsam.report.page import render
from carsam.report.source import read_source
from carsam.run import allocation

RTN = {"weight_observer": "min-max", "activation_observer": "min-max"}


@pytest.fixture(scope="module")
def subject():
    model = small_model("tinyvit")
    side, generator = family_of(model).image_size(model), torch.Generator().manual_seed(0)
    box = torch.tensor([[0.1, 0.1, 0.7, 0.8]]) * side
    # The second image has more prompts than those that judge.
    images = [
        PromptedImage(str(i), torch.randn(1, 3, side, side, generator=generator), box.repeat(count, 1))
        for i, count in enumerate((1, 5, 1))
    ]
    return model, CalibrationSet.of(images)


@pytest.fixture
def quick(monkeypatch):
    """One judge, one number of bits."""
    monkeypatch.setattr("carsam.run.allocation.MEASURED", (4,))
    monkeypatch.setattr("carsam.run.allocation.JUDGES", 1)


def layout_of(model):
    return model.config.quantization_config.layout


def test_mean_bits_are_kept_to(subject, quick, tmp_path):
    model, data = subject
    out = tmp_path / "packed"
    config = QuantizeConfig("rtn", RTN, budget="4.5bits")
    carsam.quantize(model, data, config, out=out, write_results=True)
    packed = carsam.load(out)
    sizes = {site.name: model.get_submodule(site.name).weight.numel() for site in find_sites(model).layers}
    bits = {path: spec["weight"] for path, spec in layout_of(packed)["layers"].items()}
    mean = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert 4.4 < mean <= 4.5 and len(set(bits.values())) > 1 and set(bits.values()) <= set(range(3, 9))
    inputs = {spec["input"]["bits"] for spec in layout_of(packed)["layers"].values()}
    assert len(inputs) > 1 and inputs <= set(range(3, 9))
    assert read_yaml(out / RECIPE, "")["budget"] == "4.5bits"
    # The recipe alone gives the same settings again.
    assert quantize_config(recipe=out / RECIPE).budget == "4.5bits"
    # Who opens the folder is told that its bits are not the same everywhere.
    told = "mixed under a budget of 4.5bits"
    assert f"w4a4 (weights, activations), {told}" in (out / "README.md").read_text()
    assert f"<strong>W4A4</strong>, {told}" in render(read_source(out, None)).html


def test_mean_bits_of_activations_hold_for_the_image_with_the_most_prompts(subject, quick, tmp_path):
    """Counted over an image with one prompt, an image with five would have more bits than the budget allows."""
    model, data = subject
    carsam.quantize(model, data, QuantizeConfig("rtn", RTN, budget="4.5bits"), out=tmp_path / "packed")
    packed, elements = carsam.load(tmp_path / "packed"), Counter()
    for module in packed.modules():
        if isinstance(module, SiteQuantizer | SoftmaxQuantizer) and module.bits < 16:
            module.register_forward_hook(lambda quantizer, _args, out: elements.update({quantizer.bits: out.numel()}))
    means = []
    for image in data.images[:2]:
        elements.clear()
        family_of(packed).forward(packed, image)
        means.append(sum(bits * count for bits, count in elements.items()) / elements.total())
    assert 4.4 < means[1] <= 4.5 and means[0] != means[1]


def test_sites_of_the_decoder_are_tried_at_three_numbers_of_bits(subject, monkeypatch):
    model, data = subject
    sites, method = find_sites(model), create("rtn", RTN)
    told, judged = [], []
    original = allocation.relative_error
    monkeypatch.setattr(allocation, "relative_error", lambda a, b: judged.append(len(b)) or original(a, b))

    def errors():
        plan = BitPlan.parse("w4a4")
        found = allocation.measure(model, sites, plan, method, data, lambda *place: told.append(place))
        assert told[-1][0] == told[-1][1] == len(judged)
        return {each.name: each.errors for each in found.weights}

    found, inside = errors(), set()
    assert set(judged) == {2}
    for site in sites.layers:
        # A bit more halves a step where one number of bits has been measured.
        if found[site.name][3] != pytest.approx(4 * found[site.name][4]):
            inside.add(site.name)
    assert inside and all(map(sites.in_decoder, inside))
    # One large image judges.
    monkeypatch.setattr(prompted, "LARGE", 1)
    tries, judged[:] = len(judged), []
    assert errors().keys() == found.keys() and set(judged) == {1} and len(judged) == tries


def test_choices_are_made_for_the_bits_that_a_site_has(subject, quick, monkeypatch):
    """Ranges that were learned for four bits clip what eight could hold."""
    model, data = subject
    plans, original = [], CarSamPlus.choose

    def choose(self, model, sites, data, plan, advance):
        plans.append(plan)
        return original(self, model, sites, data, plan, advance)

    monkeypatch.setattr(CarSamPlus, "choose", choose)
    settings = {"learn": False, "equivalences": {"map_steps": 0, "observers": [], "shifts": False, "images": 1}}
    packed = carsam.quantize(model, data, QuantizeConfig("car-sam-plus", settings, budget="4.5bits")).model
    (plan,) = plans
    sites = find_sites(model)
    layers = {site.name: packed.get_submodule(site.name).input_quantizer.bits for site in sites.layers}
    operands = {
        site.operand(which): getattr(packed.get_submodule(site.name).matmul, which).bits
        for site in sites.attentions
        for which in OPERANDS
    }
    assert {name: plan.activation_bits(f"{name}.input") for name in layers} == layers
    assert {name: plan.activation_bits(name) for name in operands} == operands
    assert len(set(layers.values())) > 1 and len(set(operands.values())) > 1


def test_a_softmax_output_counts_with_the_grid_that_loses_least(subject, quick):
    model, data = subject
    sites = find_sites(model)

    def errors(**settings):
        method = create("car-sam-plus", RTN | settings)
        found = allocation.measure(model, sites, BitPlan.parse("w4a4"), method, data)
        return {each.name: each.errors[4] for each in (*found.weights, *found.activations)}

    alone = [errors(softmax=grid) for grid in ("row-max", "log2")]
    alone.append(errors(equivalences={"softmax": ["uniform"]}))
    both = errors(equivalences={"softmax": ["uniform", "row-max", "log2"]})
    least = {name: min(each[name] for each in alone) for name in both}
    assert both == pytest.approx(least)
    assert sum(each != pytest.approx(least) for each in alone) >= 2  # grids do differ


def test_a_file_keeps_to_its_size(subject, quick, monkeypatch, tmp_path):
    model, data = subject
    with (
        monkeypatch.context() as patch,
        pytest.raises(BudgetError, match="nearest budget that can be met is") as refusal,
    ):
        patch.delattr("carsam.pipeline.to_integers")  # refused before the long work
        carsam.quantize(model, data, QuantizeConfig("rtn", RTN, budget="10kB"))
    nearest = str(refusal.value).rpartition(" is ")[2].rstrip(".")
    out = tmp_path / "packed"
    carsam.quantize(model, data, QuantizeConfig("rtn", RTN, budget=nearest), out=out)
    size = (out / "model.safetensors").stat().st_size
    allowed = float(nearest.removesuffix("MB")) * 1e6
    assert 0.99 * allowed < size <= allowed


@pytest.mark.parametrize(
    ("bits", "overrides"),
    [
        ("w4a4", {"mask_decoder.transformer.layers.0*": "w16a16", "*.probs": "w16a16"}),
        ("w4a4", {"vision_encoder.layers.0*": "w16a16"}),
        ("w4a16", {}),
        ("w16a4", {}),
    ],
)
def test_what_was_left_in_floating_point_stays_there(subject, quick, tmp_path, bits, overrides):
    model, data = subject
    config = QuantizeConfig("rtn", RTN, bits=bits, overrides=overrides, budget="4.5bits")
    out = tmp_path / "packed"
    carsam.quantize(model, data, config, out=out, progress=(told := Told()))
    plan, layout = BitPlan.parse(bits, overrides), layout_of(carsam.load(out))["layers"]
    for site in find_sites(model).layers:
        spec = layout.get(site.name, {"weight": 16, "input": {"bits": 16}})
        assert (spec["weight"] == 16) == (plan.weight_bits(site.name) == 16)
        assert (spec["input"]["bits"] == 16) == (plan.activation_bits(site.input) == 16)
    assert told.bits[-1][0] == told.bits[-1][1] > 0


class Told:
    """Keeps what is said of the stage that measures."""

    def __init__(self):
        self.bits = []

    def __call__(self, *_):
        pass

    def stage(self, name, done, total):
        if name == "bits" and total:
            self.bits.append((done, total))


@pytest.mark.parametrize(("budget", "memory"), [("4.5bits", {4}), ("6.5MB", {6})])
def test_a_memory_has_whole_bits(quick, tmp_path, budget, memory):
    """No image reaches it, and images judge."""
    model = small_model("sam2_video")
    side = family_of(model).image_size(model)
    box = torch.tensor([[0.1, 0.1, 0.7, 0.8]]) * side
    generator = torch.Generator().manual_seed(0)
    data = CalibrationSet.of(
        [PromptedImage(str(i), torch.randn(1, 3, side, side, generator=generator), box) for i in range(2)]
    )
    out = tmp_path / "packed"
    overrides = {"memory_encoder*": "w16a16"}  # of nothing that images judge
    config = QuantizeConfig("rtn", RTN, bits="w6a6", overrides=overrides, budget=budget)
    carsam.quantize(model, data, config, out=out)
    sites, layers = find_sites(model), layout_of(carsam.load(out))["layers"]
    images = {site.name for site in sites.on_images().layers}
    assert {spec["weight"] for name, spec in layers.items() if name not in images} - {16} == memory
    assert len({spec["weight"] for name, spec in layers.items() if name in images}) > 1


def test_what_no_model_meets_is_refused_before_anything_is_read():
    with pytest.raises(BudgetError, match="nearest budget that can be met is 3bits"):
        quantize_config(budget="2.5bits", images="nowhere")
