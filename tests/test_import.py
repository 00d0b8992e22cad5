"""``import carsam``: quick, complete, and it teaches transformers in whatever order the two are imported."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import carsam


def python(code, *arguments):
    """Runs code in a fresh Python in the checkout; its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(carsam.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_neither_torch_nor_two_seconds():
    seconds = python(
        """
        import os, sys
        import carsam
        assert not {"torch", "transformers", "numpy", "resource"} & set(sys.modules)
        print(sum(os.times()[:2]))
        """
    )
    assert float(seconds) < 2


@pytest.mark.parametrize(
    "chosen, found",
    [
        ({}, ("PASSIVE", "1000")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
        ({"GOMP_SPINCOUNT": "7"}, ("PASSIVE", "7")),
    ],
)
def test_threads_that_wait_spin_a_little_unless_the_user_says_otherwise(chosen, found):
    said = python(
        """
        import json, os, sys
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            os.environ.pop(name, None)
        os.environ.update(json.loads(sys.argv[1]))
        import carsam
        print(json.dumps([os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]))
        """,
        json.dumps(chosen),
    )
    assert tuple(json.loads(said)) == found


def test_every_public_name_is_there():
    for name in carsam.__all__:
        defined = {"CalibrationImage": "PromptedImage"}.get(name, name)
        assert getattr(carsam, name).__name__ in (defined, f"carsam.{name}")
    assert set(carsam.__all__) <= set(dir(carsam))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = carsam.quantise


def test_every_room_says_what_it_is_for():
    package = Path(carsam.__file__).parent
    rooms = sorted(package.rglob("__init__.py"))
    assert len(rooms) > 20
    silent = [str(room.relative_to(package)) for room in rooms if not ast.get_docstring(ast.parse(room.read_text()))]
    assert silent == []


def test_type_checkers_see_the_same_names():
    """The imports under TYPE_CHECKING, the table of places and ``__all__`` say the same."""
    tree = ast.parse(Path(carsam.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == carsam._PLACES
    assert sorted(carsam.__all__) == carsam.__all__
    assert set(carsam.__all__) == {*seen, "errors"}


PACKED = """
assert type(model.vision_encoder.layers[0].attn.qkv).__name__ == "PackedLayer"
import inspect, transformers.models.sam.modeling_sam as sam
assert "class SamModel" in inspect.getsource(sam)
"""


@pytest.mark.parametrize("name", ["SamModel", "AutoModel"])
def test_carsam_then_transformers(name, packed_folder):
    code = f"import sys, carsam, transformers\nmodel = transformers.{name}.from_pretrained(sys.argv[1])"
    python(code + PACKED, packed_folder)


@pytest.mark.parametrize("before", ["", "transformers, transformers.models.auto.modeling_auto, "])
def test_a_model_of_carsam_s_own_is_known_to_transformers(before, tinyvit_packed_folder):
    """Whether the automatic classes were imported before carsam or come later; ``import carsam`` stays light."""
    code = f"""
import sys
import {before}carsam
assert {bool(before)} or "torch" not in sys.modules
from transformers import AutoConfig, AutoModel
assert type(AutoConfig.from_pretrained(sys.argv[1])).__name__ == "TinyVitSamConfig"
model = AutoModel.from_pretrained(sys.argv[1])
assert type(model).__name__ == "TinyVitSamModel"
assert type(model.vision_encoder.layers[2].attn.qkv).__name__ == "PackedLayer"
assert type(carsam.load(sys.argv[1])) is type(model)
"""
    python(code, tinyvit_packed_folder)


def test_transformers_then_carsam_without_unix_only_modules(packed_folder):
    """The other order; and, as on Windows, there is no ``resource``."""
    code = """
import sys
from transformers import SamModel
for unix in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[unix] = None
import carsam
model = SamModel.from_pretrained(sys.argv[1])
carsam.load(sys.argv[1])
import carsam.pipeline, carsam.run.memory
assert carsam.run.memory.peak_memory() == 0
"""
    python(code + PACKED, packed_folder)


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "carsam", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"carsam {carsam.__version__}{os.linesep}"
