"""Notebooks are in step with their sources, show their outputs, and run from top to bottom in a clean kernel."""

import glob
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "colab"


def _build():
    spec = importlib.util.spec_from_file_location("colab_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _build()
# Run at their smallest in every run of the tests, and in CI's; the first one shows every row of the catalog.
QUICK, LONG = "2_own_model", "1_pictures"
MOST_BYTES = 600_000


def committed(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_every_source_has_a_notebook_and_every_notebook_a_source():
    assert len(build.NAMES) == 6
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == build.NAMES


@pytest.mark.parametrize("name", build.NAMES)
def test_is_in_step_with_its_source(name):
    """Else: python colab/build.py NAME."""
    cells, expected = (
        [(cell.cell_type, cell.source) for cell in each.cells] for each in (committed(name), build.notebook(name))
    )
    assert cells == expected


@pytest.mark.parametrize("name", build.NAMES)
def test_shows_what_its_cells_gave_in_order(name):
    cells = [cell for cell in committed(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "\n".join(output.get("text", "") for output in outputs)
    assert not re.search(r"\d failed|Traceback|Error:|\x1b|\r", text)


@pytest.mark.parametrize("name", build.NAMES)
def test_is_small_and_tells_nothing_of_the_machine_that_made_it(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r"/(?:tmp|root|home|work|opt|usr|var|Users)/", text)


@pytest.mark.parametrize("name", build.NAMES)
def test_badge_and_installation_have_the_address_of_the_project(name):
    address = build.repository()
    badge, install = (cell.source for cell in committed(name).cells[:2])
    path = f"{address.removeprefix('https://github.com/')}/blob/main/colab/{name}.ipynb"
    assert badge.endswith(f"(https://colab.research.google.com/github/{path})")
    assert f'"attnlab[experiments] @ git+{address}"' in install
    assert address not in (FOLDER / f"{name}.py").read_text(), "write REPOSITORY"


@pytest.mark.parametrize(
    ("driver", "devices", "extra"),
    [(None, [], None), ("550.54.15", [], "cuda12"), ("580.65.06", [], "cuda13"), (None, ["/dev/accel0"], "tpu")],
)
def test_installation_takes_the_plugin_for_what_is_there(driver, devices, extra, tmp_path, monkeypatch):
    if driver is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {driver}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    asked, find_spec, shell = [], importlib.util.find_spec, InteractiveShell()
    shell.register_magic_function(asked.append, "line", "pip")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(glob, "glob", lambda pattern: devices if pattern == "/dev/accel*" else [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "attnlab" else find_spec(name))
    shell.run_cell(build.notebook(build.NAMES[0]).cells[1].source).raise_error()
    ours = f'install -q "attnlab[experiments] @ git+{build.repository()}"'
    plugin = f'install -q "jax[{extra}]=={importlib.metadata.version("jax")}"'
    assert asked == ([ours] if extra is None else [ours, plugin])


@pytest.mark.parametrize("name", build.NAMES)
def test_what_it_refers_to_is_there(name):
    text = (FOLDER / f"{name}.py").read_text()
    for path in re.findall(r"REPOSITORY/(?:tree|blob)/main/([\w./-]+)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\bexperiments/[\w/]+\.gin", text):
        assert (ROOT / path).is_file(), path
    assert set(re.findall(r"\w+\.ipynb", text)) <= {f"{each}.ipynb" for each in build.NAMES}


def assert_runs(name, **options):
    built = build.execute(build.notebook(name, **options.pop("notebook", {})), **options)
    text = "\n".join(output.get("text", "") for cell in built.cells for output in cell.get("outputs", []))
    assert not re.search(r"\d failed", text), text


@pytest.mark.parametrize(
    "name",
    [
        QUICK,
        pytest.param(LONG, marks=pytest.mark.long),
        *(pytest.param(name, marks=pytest.mark.slow) for name in build.NAMES if name not in (QUICK, LONG)),
    ],
)
def test_runs_at_its_smallest(name):
    assert_runs(name, notebook={"quick": True})


@pytest.mark.slow
@pytest.mark.parametrize("name", build.NAMES)
def test_runs(name):
    assert_runs(name)


def _colab_python():
    """Of the version that Colab has."""
    found = [shutil.which("python3.12")]
    found += (Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions").glob("3.12.*/bin/python")
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


@pytest.mark.slow
def test_all_install_and_run_where_there_is_only_a_kernel(tmp_path, monkeypatch):
    """As on a fresh runtime: Python 3.12, and attnlab from a git address by the notebooks' own cell."""
    python = _colab_python()
    if python is None:
        pytest.skip("no Python 3.12 here")
    # Nothing of these tests' settings, whose flags are of this JAX, and there it may be another.
    for variable in [name for name in os.environ if name.startswith(("JAX_", "XLA_"))] + ["PYTHONPATH"]:
        monkeypatch.delenv(variable, raising=False)
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "attnlab"], check=True)
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-U", "pip", "ipykernel"], check=True)
    for name in build.NAMES:
        assert_runs(name, notebook={"address": (tmp_path / "attnlab").as_uri()}, python=str(python))
    program = "import attnlab; print(attnlab.__file__)"
    where = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert str(tmp_path / "venv") in where
