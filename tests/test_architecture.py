"""The house: imports go one way, every floor stands on those below it, and nothing goes round in a circle."""

import ast
import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import attnlab
import kernels_pallas

# What each part may import of attnlab. Parts are the packages and modules right inside it.
ALLOWED = {
    "attention": set(),
    "nn": {"attention"},
    "models": {"nn", "attention"},
    "data": {"attention", "errors"},
    "train": {"models", "data", "nn", "attention", "errors", "signals"},
    "ablate": {"train", "models", "data", "nn", "attention", "errors", "signals", "config", ""},
    "catalog": {""},
    "bench": {"catalog", "models", "nn", "errors", "signals", "attention", ""},
    "doctor": {"", "attention"},
    "peers": {"train", "models", "data", "nn", ""},
    "new": {"config", "errors"},
    "regress": {"ablate", ""},
    "show": {"models", "nn", "attention", "errors"},
    "config": {"errors", "train", "models", "data", "nn"},
    "export": {"errors", "config", "train", "data", "nn", "attention", ""},
    "cli": {
        "errors",
        "signals",
        "config",
        "export",
        "new",
        "show",
        "bench",
        "doctor",
        "regress",
        "ablate",
        "train",
        "models",
        "data",
        "nn",
        "",
    },
    "errors": set(),
    "signals": set(),
    "__init__": {"attention"},
}
# Floors inside attention, each above what it may import: mechanisms and merge, then these.
FLOORS = ("_kernels", "_shared", "_dispatch", "masks", "checks")
# Third parties that the primitives may import, beside the standard library.
CORE = {"jax", "einops", "numpy"}


def sources(package):
    """Paths by module name."""
    folder = Path(package.__file__).parent
    names = {path: path.relative_to(folder.parent).with_suffix("").parts for path in folder.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


SOURCES = sources(attnlab) | sources(kernels_pallas)


@functools.cache
def imports(module):
    """Absolute names imported anywhere in a module, also inside functions: modules of ours where they are that, else
    {"package.name"}."""
    names = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in SOURCES else node.module for name in full} if node.module in SOURCES else full
    return names


def part(module):
    """attnlab.nn.mixers.local -> "nn"; attnlab itself -> "__init__"."""
    return module.split(".")[1] if "." in module else "__init__"


def floor(module):
    """Of a module of attnlab.attention: a number that grows downwards."""
    room = module.split(".")[2] if module.count(".") > 1 else ""
    room = "checks" if module == "attnlab.attention._shared.checks" else room
    return 1 + FLOORS.index(room) if room in FLOORS else 0


OURS = sorted(name for name in SOURCES if name.split(".")[0] == "attnlab")
ATTENTION = [name for name in OURS if name.startswith("attnlab.attention")]
KERNELS = sorted(set(SOURCES) - set(OURS))


@pytest.mark.parametrize("module", [*ATTENTION, *KERNELS])
def test_what_a_run_executes_is_imported_by_statements(module):
    """An ablation finds it by them; a module that is imported by a computed name would change and reuse stale runs."""
    assert "importlib.import_module" not in SOURCES[module].read_text()


@pytest.mark.parametrize("module", OURS)
def test_imports_go_one_way(module):
    for name in imports(module):
        top = name.split(".")[0]
        if top == "attnlab":
            imported = "" if name == "attnlab" else part(name)
            assert imported in ALLOWED[part(module)] | {part(module)}, f"{module} imports {name}"
        assert top != "gin" or module == "attnlab.config", f"{module} imports gin; only config may"
        rooms = ("attnlab.attention._kernels", "attnlab.train.compile", "attnlab.bench.tpu_cases")
        assert top != "kernels_pallas" or module.startswith(rooms), f"{module} imports kernels_pallas"


@pytest.mark.parametrize("module", ATTENTION)
def test_every_floor_of_attention_stands_on_those_below(module):
    """Mechanisms and merge above _kernels above _shared above _dispatch, masks below them all, and below these the
    checks of arguments."""
    if module in ("attnlab.attention", "attnlab.attention._public"):
        return
    for name in imports(module):
        if name.startswith("attnlab.attention"):
            assert name != "attnlab.attention", f"{module} imports the package around it"
            assert floor(name) >= floor(module), f"{module} imports {name} from above"


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_import_nothing_from_attnlab(module):
    """And what one backend has is not imported by another, nor by what both share."""
    for name in imports(module):
        assert name.split(".")[0] != "attnlab", f"{module} imports {name}"
        if name.startswith(("kernels_pallas.tpu", "kernels_pallas.gpu")):
            backend = ".".join(name.split(".")[:2])
            assert module.startswith((backend, "kernels_pallas.aot")), f"{module} imports {name}"


def test_nothing_is_imported_in_a_circle():
    """At no level and at no time: imports inside functions and of types count too. An import of a module also imports
    the packages around it, but for those that the importing module is in itself."""

    def needs(module):
        for name in imports(module) & set(SOURCES):
            packages = itertools.accumulate(name.split("."), "{}.{}".format)
            yield from (package for package in packages if not f"{module}.".startswith(f"{package}."))

    finished, path = set(), []

    def visit(module):
        if module in finished:
            return
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        path.append(module)
        for name in sorted(needs(module)):
            visit(name)
        finished.add(path.pop())

    for module in SOURCES:
        visit(module)


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


@pytest.mark.parametrize("module", ATTENTION)
def test_attention_imports_jax_einops_and_the_standard_library(module):
    third = {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names)
    drawing = {"matplotlib"} if module == "attnlab.attention.masks" else set()  # lazily, to draw a mask
    assert third <= CORE | {"attnlab", "kernels_pallas"} | drawing
