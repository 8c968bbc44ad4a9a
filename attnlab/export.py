"""A trained model as files that need no trainer: `attnlab export RUN` writes them, and `load` gives the model.

    model = export.load("runs/train/small/export")
    logits = model(tokens)

model.safetensors has every value by its path, "layers.0.mixer.query.kernel", as float32; config.gin builds the model;
README.md is the model card; what tokens stand for is in vocabulary.json or tokenizer.json, unless they are bytes.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import attnlab
from attnlab import config, nn
from attnlab.attention._shared.checks import shape_text
from attnlab.data.shards import ShardedCorpus
from attnlab.errors import UserError, parse_json
from attnlab.train import Experiment, restore_values
from attnlab.train.store import here
from attnlab.train.tasks.texts import TextTask
from attnlab.train.workdir import last_step

_VALUES, _CONFIG, _CARD = "model.safetensors", "config.gin", "README.md"


def export(experiment: Experiment, workdir: Path, folder: Path, *, trusts: bool = True) -> int:
    """Writes the newest checkpoint's values of a run of this experiment into a new or empty folder; returns its step.

    Raises UserError: there is no checkpoint, or the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"out: {folder} holds something already, maybe an earlier export; give a new folder with --out")
    step, root = last_step(workdir), type(experiment.model).__name__
    values = flatten_dict(restore_values(experiment, workdir), sep=".")
    with here(workdir / _CONFIG) as source:
        built = config.build([str(source)], root=root, trusts=trusts)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"format": "attnlab", "class": root, "step": str(step), "version": attnlab.__version__}
    arrays = {name: np.asarray(value) for name, value in values.items()}
    save_file(arrays, folder / _VALUES, metadata=facts)
    (folder / _CONFIG).write_text(f"# The model of {_VALUES}.\n{built.text}")
    tokens = _write_vocabulary(experiment.task, folder)
    (folder / _CARD).write_text(_card(experiment, workdir, step, tokens, _modules_of_others(built.text)))
    (folder / _VALUES).chmod((folder / _CONFIG).stat().st_mode)  # safetensors lets nobody else read its file
    return step


def load(folder: str | Path, *, trusts: bool = False) -> nnx.Module:
    """The model of a folder that `export` wrote, with its values, on the default device: ready to call.

    trusts: whether the config may import modules that are not attnlab's, which runs their code.

    Raises UserError: a file is missing or damaged, or the values are not those of the model.
    """
    path = Path(folder) / _VALUES
    if not path.is_file():
        raise UserError(f"export: {folder} has no {_VALUES}; give a folder that `attnlab export` wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            facts, values = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"export: cannot read {path} ({' '.join(str(error).split())[:100]})") from error
    if facts.get("format") != "attnlab":
        raise UserError(f"export: {path} is not from `attnlab export`")
    model = config.build([str(Path(folder) / _CONFIG)], root=facts["class"], trusts=trusts).value
    needed = flatten_dict(jax.eval_shape(lambda: nn.initialize(model, jax.random.key(0))), sep=".")
    _check_values(values, needed, path)
    return nn.bind(model, unflatten_dict({name: jnp.asarray(value) for name, value in values.items()}, sep="."))


def _check_values(given: Mapping[str, Any], needed: Mapping[str, Any], path: Path) -> None:
    for name, value in needed.items():
        if name not in given or given[name].shape != value.shape:
            found = f"has {shape_text(given[name])} as {name}" if name in given else f"has no {name}"
            raise UserError(f"export: {path} {found}; the config's model needs {shape_text(value)}")
    if strange := given.keys() - needed.keys():
        raise UserError(f"export: {path} has {min(strange)}, which the config's model has not")


def _write_vocabulary(task: Any, folder: Path) -> str:
    """Writes what tokens stand for, and says it in a sentence; "" where the model reads none."""
    if not isinstance(task, TextTask):
        return ""
    corpus = task.corpus
    if isinstance(corpus, ShardedCorpus):
        shutil.copy(corpus.folder / "tokenizer.json", folder)
        return "Tokens are those of tokenizer.json, which the library tokenizers reads."
    if not corpus.symbols:
        return "Tokens are bytes of UTF-8." if corpus.unit == "byte" else ""
    (folder / "vocabulary.json").write_text(json.dumps({"unit": corpus.unit, "symbols": corpus.symbols}) + "\n")
    return f"Tokens are {corpus.unit}s, numbered as in vocabulary.json."


def _modules_of_others(text: str) -> list[str]:
    """Modules that a config imports and that are not attnlab's, by which its model is built."""
    imported = (line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from ")))
    return sorted({name for name in imported if name.split(".")[0] not in ("attnlab", "__gin__")})


def _card(experiment: Experiment, workdir: Path, step: int, tokens: str, others: Sequence[str]) -> str:
    model, task, root = experiment.model, experiment.task, type(experiment.model).__name__
    trust = ", trusts=True" if others else ""
    # A task of blocks draws under this one.
    block = getattr(task, "block", None)
    pattern = f", pattern=nn.Pattern(masks.block_causal({block}))" if block else ""
    facts = {
        "Parameters": f"{nn.count_parameters(model):,}",
        "Trained": f"{step:,} of {experiment.steps:,} steps of {experiment.batch_size} examples",
        "Seed": str(experiment.seed),
        **{f"Data, {name}": str(value) for name, value in task.describe().items()},
        **{f"Validation, {name}": f"{value:.4g}" for name, value in _metrics(workdir, step).items()},
    }
    lines = [
        "---",
        "library_name: attnlab",
        "tags: [jax, flax, attention]",
        "---",
        "",
        f"# {workdir.name or root}",
        "",
        f"A {root} trained with attnlab {attnlab.__version__}, for research on attention mechanisms. {tokens}".rstrip(),
        "",
        "```python",
        f"from attnlab import export{', masks, nn' if pattern else ''}",
        "",
        f'model = export.load("FOLDER"{trust})  # this folder',
        f"out = model({'tokens' if isinstance(task, TextTask) else 'inputs'}{pattern})",
        "```",
        "",
        f"It needs attnlab with its extra experiments{' and the modules ' * bool(others)}{', '.join(others)}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(name)} | {_cell(text)} |" for name, text in facts.items()),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _metrics(workdir: Path, step: int) -> dict[str, float]:
    """Of the newest validation up to this step."""
    try:
        rows = [parse_json(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["split"] == "validation" and row["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # the card goes without
    last = rows[-1] if rows else {}
    rest = ("step", "seconds")
    return {name: value for name, value in last.items() if name not in rest and isinstance(value, (int, float))}
