"""The one-way line of imports: cli, ablate -> train -> models, data -> nn -> attention -> kernels_pallas."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attnlab
import kernels_pallas

ROOT = Path(attnlab.__file__).parent
# What each part may import of attnlab. kernels_pallas is loaded lazily, by attention alone.
ALLOWED = {
    "attention": {"attention"},
    "nn": {"nn", "attention"},
    "models": {"models", "nn", "attention"},
    "data": {"data", "errors"},
    "train": {"train", "models", "data", "nn", "attention", "errors"},
    "ablate": {"ablate", "train", "models", "data", "nn", "attention", "errors", "config", ""},
    "bench": {""},
    "regress": {""},
    "show": {"models", "nn", "attention"},
    "config": {"errors", "train", "models", "data", "nn"},
    "cli": {"errors", "config", "show", "bench", "regress", "ablate", "train", "models", "data", "nn"},
    "errors": set(),
    "__init__": {"attention"},
}
# Third parties that a part may import, beside the standard library.
CORE = {"jax", "einops"}


def imports(path: Path) -> set[str]:
    """Absolute names imported anywhere in a file, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


SOURCES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    known = set(ALLOWED)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "attnlab":
            imported = rest[0] if rest and rest[0] in known else ""
            assert imported in ALLOWED[part(path)], f"{path.name} imports {name}"
        assert top != "gin" or part(path) == "config", f"{path.name} imports gin; only config.py may"
        assert top != "kernels_pallas" or part(path) == "attention", f"{path.name} imports kernels_pallas"


@pytest.mark.parametrize("path", sorted(Path(kernels_pallas.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_nothing_from_attnlab(path):
    assert not [name for name in imports(path) if name.split(".")[0] == "attnlab"]


def test_import_attnlab_needs_jax_and_einops_alone():
    """Importing attnlab loads no third party that jax and einops do not load, and no kernels."""
    program = """
import sys
import jax, jax.numpy, jax.extend, jax.experimental, einops
before = {name.split(".")[0] for name in sys.modules}
import attnlab
after = {name.split(".")[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names)))
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == ["attnlab"]


@pytest.mark.parametrize("path", [path for path in SOURCES if part(path) == "attention"], ids=lambda path: path.name)
def test_attention_imports_jax_einops_and_the_standard_library(path):
    third = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    drawing = {"matplotlib"} if path.name == "masks.py" else set()  # lazily, to draw a mask
    assert third <= CORE | {"attnlab", "kernels_pallas", "numpy"} | drawing
