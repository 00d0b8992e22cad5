"""The house: which rooms there are, which may use which, and that only a family knows the names of its modules."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from small_models import SMALL_MODELS, small_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import carsam
from carsam.models.family import families
from carsam.models.skeleton import skeleton

PACKAGE = Path(carsam.__file__).parent
ROOT = PACKAGE.parent
FAMILIES = sorted(path.parent.name for path in (PACKAGE / "models").glob("*/family.py"))

# Each may import those before it. What a room imports from a later one stands below, with the reason.
ORDER = (
    *("errors", "version", "plugins", "settings", "device", "reading"),
    *("bits", "config", "output", "quantizers", "models", "data", "prompts", "calibrate", "transform", "compensate"),
    *(
        "reconstruct",
        "methods",
        "pack",
        "export",
        "runtime",
        "predict",
        "evaluate",
        "run",
        "benchmark",
        "pipeline",
        "diagnose",
        "report",
        "commands",
        "cli",
    ),
)
BACKWARDS = {
    # A model's normalisation of pixels is part of it, and read and checked with its weights.
    "models/folder.py": {"data"},
    "models/load.py": {"data"},
    "models/sam/meta.py": {"data"},
    "models/sam/segment_anything.py": {"data"},
    "models/tinyvit/meta.py": {"data"},
    "models/tinyvit/random.py": {"data"},
    # A family gives its units, and says how the inputs of each are captured.
    "models/sam/decoder.py": {"calibrate", "reconstruct"},
    "models/sam/encoder.py": {"calibrate", "reconstruct"},
    "models/sam/family.py": {"reconstruct"},
    "models/sam2_video/memory.py": {"calibrate", "reconstruct"},
    # And it makes the clips that calibrate a memory out of images.
    "models/sam2_video/family.py": {"prompts", "reconstruct"},
    "models/sam2/encoder.py": {"calibrate", "reconstruct"},
    "models/sam2/family.py": {"reconstruct"},
    # Parts of a model that run on integers as a whole.
    "models/sam/integers.py": {"runtime"},
    # carsam.load(runtime=...) gives a model that runs on integers.
    "pack/checkpoint.py": {"runtime"},
    # What lies in the folder to write is looked at before anything long begins.
    "output/checks.py": {"methods", "models", "pack", "prompts", "run"},
    "output/finished.py": {"methods", "pack", "run"},
    "output/target.py": {"pack"},
    # Masks are drawn over an image in one way.
    "predict/drawing.py": {"evaluate"},
    # Finished images are kept under the fingerprint of the code, as finished units are.
    "evaluate/journal.py": {"run"},
    # A comparison quantizes by the whole story.
    "run/measured.py": {"pipeline"},
    # A time and a size are written in one way.
    "report/numbers.py": {"commands"},
    # carsam.quantize(progress=True) shows what the command line shows.
    "pipeline.py": {"commands"},
}
# Longer files, each with the reason; none today.
LONG: dict[str, str] = {}
LINES = 450


def sources(folder=PACKAGE):
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node, *, late=True):
    """Names of carsam's modules that a file imports when it runs; without ``late`` only those at its import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not late:
            continue
        if isinstance(child, ast.ImportFrom) and child.module == "carsam":
            yield from (f"carsam.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and (child.module or "").startswith("carsam."):
            # What is imported from a package may be a module of it.
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.startswith("carsam."))
        yield from imports(child, late=late)


def room(name):
    """The room of a file: a folder of the package, or a module that stands alone."""
    return name.partition("/")[0].removesuffix(".py")


def test_rooms_stand_in_order():
    found = {}
    for name, path in sources().items():
        if room(name) in ("__init__", "__main__"):
            continue
        place = ORDER.index(room(name))  # a new room takes its place in the order
        others = {module.split(".")[1] for module in imports(tree(path))} - {room(name)}
        if later := {other for other in others if ORDER.index(other) > place}:
            found[name] = later
    assert found == BACKWARDS


def test_no_module_imports_itself_over_others():
    """Imports at the top of modules, without those for type checkers, go round in no circle."""
    modules = {}
    for name, path in sources().items():
        modules["carsam." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = path
    edges = {
        name: {other for other in imports(tree(path), late=False) if other in modules} - {name}
        for name, path in modules.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(edges[name]):
                visit(other)
            done.add(path.pop())

    for name in edges:
        visit(name)
    assert len(done) > 150


def test_the_rooms_of_the_design_are_there():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    story = {"models", "data", "prompts", "quantizers", "bits", "calibrate", "transform", "compensate", "reconstruct"}
    assert rooms == {
        *story,
        "benchmark",
        "methods",
        "run",
        "pack",
        "runtime",
        "export",
        "predict",
        "evaluate",
        "diagnose",
        "report",
        "commands",
        "output",
    }
    for name in sorted(rooms):
        first = (ast.get_docstring(tree(PACKAGE / name / "__init__.py")) or "").partition("\n")[0]
        assert first.endswith((".", ".,", ":")) or "``" in first, (name, first)
    for family in FAMILIES:
        assert {"__init__.py", "family.py", "names.py"} <= {
            path.name for path in (PACKAGE / "models" / family).iterdir()
        }


def test_files_are_short():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in sources().items()}
    assert {name for name, length in lengths.items() if length > LINES} == set(LONG)


# Words that modules or settings of models have in common with everything else.
GENERIC = {
    *("act", "activation", "attn", "bias", "blocks", "conv", "conv1", "conv2", "conv3", "layers", "mlp", "proj"),
    *("projection", "scale"),
    *("transformer", "weight", "layer_norm1", "layer_norm2", "layer_norm3", "layer_norm4"),
    # Settings that every family's configuration may have, and methods of the contract itself.
    *("image_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "window_size", "depths"),
    # transformers' interface for all of its models.
    *("base_model_prefix", "config_class", "forward", "input_modalities", "main_input_name", "get_input_embeddings"),
}
# What segment-anything calls its parts: users see it at the drop-in's interface.
INTERFACE = {"neck"}


@cache
def spelled():
    """Every name that only a family may spell: of modules, parameters, classes, methods and settings of its models."""
    names = set()
    for family in families().values():
        small = small_model(family.name)
        for part in (*(name for name, _ in small.named_modules()), *(name for name, _ in small.named_parameters())):
            names |= words(part)
        configs = [small.config, *(getattr(small.config, key) for key in small.config.sub_configs)]
        for config in configs:
            names |= set(config.to_dict()) - set(PreTrainedConfig().to_dict())
        for thing in (*small.modules(), *configs):
            if not type(thing).__module__.startswith(("torch.", "transformers.activations")):
                names.add(type(thing).__name__)
        names |= {name for name in vars(family.model_class) if not name.startswith("_")} - set(dir(PreTrainedModel))
        names |= {word for word in words(family.published_anchor) if len(word) > 3}
        names |= {base.__name__ for base in family.model_class.__mro__} - {
            base.__name__ for base in PreTrainedModel.__mro__
        }
    return frozenset(names)


def words(text):
    return set(re.findall(r"[A-Za-z_]\w*", text))


def violations(path):
    """(line, what) where a file spells a name of a family's."""
    forbidden = spelled() - GENERIC - INTERFACE

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.keyword) and child.arg in ("help", "epilog"):
                continue  # examples of patterns
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            named = set()
            if isinstance(child, ast.Attribute):
                named = {child.attr}
            elif isinstance(child, ast.Constant) and isinstance(child.value, str):
                named = words(child.value)
            elif isinstance(child, ast.Name):
                named = {child.id} & {name for name in forbidden if name[0].isupper()}
            elif isinstance(child, (ast.Import, ast.ImportFrom)):
                named = {alias.name.rpartition(".")[2] for alias in child.names}
            for name in sorted(named & forbidden):
                yield child.lineno, name
            yield from visit(child)

    yield from visit(tree(path))


OUTSIDE = sorted(name for name in sources() if not name.startswith(tuple(f"models/{family}/" for family in FAMILIES)))


def test_the_words_are_those_of_the_families():
    """Derived from models, so that a new family's are looked for too; exceptions that no model has are none."""
    assert set(SMALL_MODELS) == set(families())
    assert spelled() >= {
        *("vision_encoder", "mask_decoder", "prompt_encoder", "image_encoder", "qkv", "q_proj", "lin1", "local_conv"),
        *("cross_attn_token_to_image", "get_image_embeddings", "vision_config", "SamModel", "TinyVitSamModel"),
        *("SamConfig", "rel_pos_h", "attention_biases", "merge_strides"),
    }
    assert spelled() >= INTERFACE


def test_only_a_family_spells_the_names_of_its_modules():
    found = {name: sorted(set(violations(PACKAGE / name))) for name in OUTSIDE}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("folder", ["benchmarks", "tools"])
def test_benchmarks_and_tools_ask_the_family_too(folder):
    # Some compare with Meta's packages, whose names they must know; one trains a model, whose loss is of its parts.
    # The benchmark of a GPU measures SAM's image encoder, and gives its attentions other routes in floating point.
    training = {path for path in sources(ROOT / folder) if path.startswith("train_sam2/")}
    left_out = {"tools": {"check_parity.py", *training}, "benchmarks": {"gpu.py"}}.get(folder, set())
    found = {name: list(violations(path)) for name, path in sources(ROOT / folder).items() if name not in left_out}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_only_families_import_families():
    """And models of transformers; everything else asks the registry."""
    allowed = {"commands/litemedsam.py": {"carsam.models.tinyvit.published"}}  # a showcase of that very model
    found = {}
    for name in OUTSIDE:
        modules = {node.module or "" for node in ast.walk(tree(PACKAGE / name)) if isinstance(node, ast.ImportFrom)}
        modules |= {
            alias.name
            for node in ast.walk(tree(PACKAGE / name))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        of_families = tuple(f"carsam.models.{family}" for family in FAMILIES)
        if wrong := {module for module in modules if module.startswith((*of_families, "transformers.models"))}:
            found[name] = wrong
    assert found == allowed


def test_the_test_sees_what_it_must(tmp_path):
    """Attributes, strings, imports and classes are seen; docstrings, help and words that only look alike are not."""
    path = tmp_path / "wrong.py"
    path.write_text(
        '"""Of q_proj and SamModel."""\n'
        "from transformers import SamModel\n"
        "def f(model: SamModel, option=dict(help='such as mask_decoder.*')):\n"
        "    'The mask_decoder.'\n"
        "    model.vision_encoder.layers\n"
        "    return f'{model}.mask_decoder.transformer', 'my_q_proj', model.projection\n"
    )
    assert sorted(violations(path)) == [
        *((2, "SamModel"), (3, "SamModel"), (5, "vision_encoder"), (6, "mask_decoder")),
    ]


def test_small_models_are_what_loading_gives():
    for name, make in SMALL_MODELS.items():
        model = make()
        assert isinstance(model, families()[name].model_class) and not model.training
        assert skeleton(type(model), model.config).state_dict().keys() == model.state_dict().keys()
        assert all(isinstance(module, nn.Module) for module in model.children())


def test_no_two_test_files_share_a_name():
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
