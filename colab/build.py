"""Notebooks from their sources: executes colab/NAME.py in a clean kernel and writes colab/NAME.ipynb with its outputs.

    python colab/build.py [NAME...]        by default all; --python PATH for another environment's kernel

A source is Python with cells as jupytext's py:percent has them, so that its changes can be read. A notebook has two
cells before those: a badge that opens it in Colab, and one that installs attnlab where it is not there. In a source

    # %% writes="FILE"         is a cell that is written to a file; what is not Python stands in comments
    # %% quick="STATEMENTS"    is a cell that a quick run, as of the tests, ends with these
    REPOSITORY                 is the address that pyproject.toml states, as in the badge and where attnlab is installed
"""

import argparse
import os
import re
import resource
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
SECONDS = 3600  # that a cell may take, on a busy machine

_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
_INSTALL = """\
# Installs attnlab on a fresh runtime, and jax's plugin for its GPU or TPU. Should Colab then ask to restart, do so.
import glob
import importlib.metadata
import importlib.util
import shutil

if importlib.util.find_spec("attnlab") is None:
    %pip install -q "attnlab[experiments] @ git+{repository}"
    jax_version = importlib.metadata.version("jax")
    if shutil.which("nvidia-smi"):
        driver = !nvidia-smi --query-gpu=driver_version --format=csv,noheader
        cuda = 13 if int(driver[0].partition(".")[0]) >= 580 else 12
        %pip install -q "jax[cuda{{cuda}}]=={{jax_version}}"
    elif glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        %pip install -q "jax[tpu]=={{jax_version}}\""""


def repository() -> str:
    """The address that pyproject.toml states."""
    with (FOLDER.parent / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["urls"]["Repository"]


def notebook(name: str, *, address: str | None = None, quick: bool = False) -> NotebookNode:
    """The notebook of a source, not executed. address: of the repository, for the install cell."""
    owner = repository().removeprefix("https://github.com/")
    badge = _BADGE.format(address=f"https://colab.research.google.com/github/{owner}/blob/main/colab/{name}.ipynb")
    install = _INSTALL.format(repository=address or repository())
    source = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    cells = [nbformat.v4.new_markdown_cell(badge), nbformat.v4.new_code_cell(install)]
    for cell in source.cells:
        if file := cell.metadata.pop("writes", None):
            text = cell.source if file.endswith(".py") else re.sub("^# ?", "", cell.source, flags=re.MULTILINE)
            cell.source = f"%%writefile {file}\n{text}"
        if (statement := cell.metadata.pop("quick", None)) and quick:
            cell.source += f"\n{statement}"
        cell.source = cell.source.replace("REPOSITORY", repository())
        cells.append(cell)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def execute(built: NotebookNode, *, python: str = sys.executable) -> NotebookNode:
    """Runs a notebook in a kernel of its own, in an empty folder; `python` has ipykernel. Raises where a cell fails."""
    environment = {**os.environ, "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(built, kernel_name="python3", timeout=SECONDS, resources={"metadata": {"path": folder}})
        client.create_kernel_manager().kernel_spec.argv[0] = python
        client.execute(env=environment)
        return _cleaned(built, folder)


def _cleaned(built: NotebookNode, folder: str) -> NotebookNode:
    """Without what another machine would not print: warnings, colours, overwritten lines, folders, times of cells."""
    for cell in built.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                print(output.text, file=sys.stderr)
                continue
            if output.output_type == "stream":
                if kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                    continue
            else:
                output.metadata = NotebookNode()
            kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                output.text = _printed(output.text, folder)
            for kind, text in output.get("data", {}).items():
                if isinstance(text, str) and kind != "image/png":
                    output.data[kind] = text.replace(f"{folder}/", "").replace(folder, ".")
        cell.outputs = [output for output in kept if output.get("text", "some").strip()]
    return built


def _printed(text: str, folder: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r\n", "\n")
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    lines = [line for line in lines if not line.startswith(("WARNING: ", "Note: you may need to restart"))]  # pip's
    return "\n".join(lines).replace(f"{folder}/", "").replace(folder, ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="which has ipykernel and attnlab")
    given = parser.parse_args()
    for name in [Path(each).stem for each in given.names] or NAMES:
        path, start, spent = FOLDER / f"{name}.ipynb", time.perf_counter(), _processor_seconds()
        nbformat.write(execute(notebook(name), python=given.python), path)
        seconds = f"{time.perf_counter() - start:.0f} s, {_processor_seconds() - spent:.0f} s of a processor"
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {seconds}", flush=True)


def _processor_seconds() -> float:
    """Of kernels that have ended, and of what they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
