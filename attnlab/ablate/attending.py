"""What a trained model attends to in one validation example, and how it continues a text: read off after a run."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import nn
from attnlab.ablate.results import mean_of_known, printable
from attnlab.errors import parse_json
from attnlab.models.blocks import Block, Stack
from attnlab.nn.mixers.base import check_weights, given
from attnlab.train import Experiment, LanguageTask, restore_values
from attnlab.train.store import replace_text
from attnlab.train.tasks.texts import TextTask
from attnlab.train.workdir import last_step

# Weights of every layer are computed whole, [heads, positions, positions]: no longer examples than this.
_MOST_POSITIONS = 512
_MAP_SIDE = 64
# At which texts are continued.
TEMPERATURE = 0.8


def attend(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Writes folder/attending.json, and samples.txt where the task is a text, from a run's newest checkpoint.

    What is there already stays. The example is the first of the validation data.

    Returns:
      for the run's row: {"distance", "entropy": means over heads and queries, one number per layer} (see `summarize`),
      or {"skipped": why}.

    Raises UserError: the checkpoint cannot be read.
    """
    if (kept := read_attending(folder)) is None:
        if last_step(folder) == 0:
            return {"skipped": "the run's folder has no checkpoint"}
        values = restore_values(experiment, folder)
        batch = jax.tree.map(jnp.asarray, next(iter(experiment.task.batches("validation", 1, experiment.seed))))
        kept = {"example": show_example(experiment, batch), **_layers(experiment, values, batch)}
        if isinstance(experiment.task, TextTask):
            model: Any = experiment.model
            if isinstance(experiment.task, LanguageTask) and (reason := model.decoding_refusal):
                replace_text(folder / "samples.txt", f"(nothing: {reason})")
            else:
                ((kept["prompt"], continuation),) = experiment.task.continuations(
                    model, values, key=jax.random.key(experiment.seed), count=1, temperature=TEMPERATURE
                )
                replace_text(folder / "samples.txt", continuation)
        replace_text(folder / "attending.json", json.dumps(kept))
    if "skipped" in kept:
        return {"skipped": kept["skipped"]}
    return {name: [mean_of_known(layer[name]) for layer in kept["layers"]] for name in ("distance", "entropy")}


def read_attending(folder: Path) -> dict[str, Any] | None:
    """What `attend` kept in a run's folder, if it did.

    {"example": {"text"} or {"pixels": a map [Y, X, channels]}, "prompt", and "skipped" or "layers"}. A layer is
    {"mixer": name, "map": [T, S] pooled, "middle": [Y, X] of the query in the middle of a grid, "is_signed", "distance"
    and "entropy": one number per head, None for one that sees nothing}; a map is {"shape", "base64": of uint8}.
    """
    try:
        kept = parse_json((folder / "attending.json").read_bytes())
    except (FileNotFoundError, ValueError):  # a damaged one is as good as none: `attend` writes it again
        return None
    return printable(kept) if _is_whole(kept) else None


def _is_whole(kept: Any) -> bool:
    """Whether this is what `attend` writes, so that the report can rely on it."""
    try:
        example, maps = kept["example"], []
        if "pixels" in example:
            maps.append(example["pixels"])
        elif not isinstance(example["text"], str):
            return False
        if not isinstance(kept.get("prompt", ""), str):
            return False
        if "skipped" in kept:
            return isinstance(kept["skipped"], str)
        for layer in kept["layers"]:
            numbers = [*layer["distance"], *layer["entropy"]]
            if not all(number is None or isinstance(number, (int, float)) for number in numbers):
                return False
            if not isinstance(layer["mixer"], str) or not isinstance(layer["is_signed"], bool):
                return False
            maps += [layer[name] for name in ("map", "middle") if name in layer]
        return all(unpacked(packed).size for packed in maps)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def layer_weights(
    experiment: Experiment, values: nn.Parameters, batch: dict[str, jax.Array]
) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    """(mixer's name, space, weights [N, T, S] of example 0) of every block, as the model evaluates a batch.

    Raises ValueError: the model has no blocks, an example has too many positions, or a mixer is not linear in its
    values.
    """
    seen: list[tuple[str, tuple[int, ...]]] = []

    def weights(values: nn.Parameters, batch: dict[str, jax.Array]) -> list[jax.Array]:
        model = nn.bind(experiment.model, values)
        modules = sorted(nnx.iter_modules(model), key=lambda module: module[0])  # by path, so that layers come in order
        blocks: list[Any] = [module for _, module in modules if isinstance(module, Block)]
        recorders = [_Recorder(block.mixer) for block in blocks]
        for block, recorder in zip(blocks, recorders):
            block.mixer = recorder
        for _, module in modules:
            if isinstance(module, Stack):
                # There is no backward, and what is recomputed or looped over leaves no records.
                module.remat = module.scan_layers = False
        experiment.task.loss(model, batch, key=None)
        seen[:] = [(type(recorder.mixer).__name__, recorder.space) for recorder in recorders]
        return [recorder.weights.get_value()[0].astype(jnp.float32) for recorder in recorders]

    shapes = jax.eval_shape(weights, values, batch)
    if not shapes:
        raise ValueError("model: it has no blocks with a mixer")
    most = max(math.prod(space) for _, space in seen)
    if most > _MOST_POSITIONS:
        raise ValueError(f"length: an example has {most} positions; weights are shown of at most {_MOST_POSITIONS}")
    arrays = jax.jit(weights)(values, batch)
    for (name, _), array in zip(seen, arrays):
        check_weights(name, array)
    return [(name, space, np.asarray(array)) for (name, space), array in zip(seen, arrays)]


class _Recorder(nnx.Module):
    """A mixer that keeps the attention weights of its last call."""

    def __init__(self, mixer: nn.Attention):
        self.mixer = mixer

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        self.space = x.shape[1:-1]
        pattern = given(pattern=options.get("pattern"))
        self.weights = nnx.Intermediate(self.mixer.attention_weights(x, **pattern))
        return self.mixer(x, **options)


def summarize(weights: np.ndarray, space: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean attention distance, in positions, and entropy, in nats, of weights [N, T, S]: two arrays [N], NaN for none.

    With p = |w| / sum |w| of a query: the mean over queries of sum p |i - j|, Euclidean on a grid, and of -sum p log p.
    Queries that see nothing are left out.
    """
    positions = np.stack(np.unravel_index(np.arange(math.prod(space)), space), axis=-1)
    distances = np.linalg.norm(positions[:, None] - positions[None, :], axis=-1)
    shares, sees = _shares(weights)
    surprise = -np.log(np.where(shares > 0, shares, 1.0))
    queries = np.where(sees.sum(axis=1) > 0, sees.sum(axis=1), np.nan)
    distance, entropy = (np.sum(shares * cost, axis=(1, 2)) / queries for cost in (distances, surprise))
    return distance, entropy


def _shares(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|w| / sum |w|, [N, T, S], and whether a query sees anything, [N, T]; zeros where it does not."""
    size = np.abs(weights.astype(np.float64))
    total = size.sum(axis=-1, keepdims=True)
    return size / np.where(total > 0, total, 1.0), total[..., 0] > 0


def _layers(experiment: Experiment, values: nn.Parameters, batch: dict[str, jax.Array]) -> dict[str, Any]:
    try:
        layers = layer_weights(experiment, values, batch)
    except ValueError as error:
        return {"skipped": str(error)}
    return {"layers": [describe_layer(*layer) for layer in layers]}


def describe_layer(mixer: str, space: tuple[int, ...], weights: np.ndarray) -> dict[str, Any]:
    """A layer's entry in attending.json, from its weights [N, T, S]."""
    distance, entropy = summarize(weights, space)
    shares = _shares(weights)[0].mean(axis=0)
    layer = {
        "mixer": mixer,
        "is_signed": bool(np.any(weights < 0)),
        "map": _packed(_row_scaled(_pooled(shares))),
        "distance": _numbers(distance),
        "entropy": _numbers(entropy),
    }
    if len(space) == 2:
        middle = shares[np.ravel_multi_index([length // 2 for length in space], space)]
        layer["middle"] = _packed(_row_scaled(middle[None, :])[0].reshape(space))
    return layer


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


def _pooled(shares: np.ndarray) -> np.ndarray:
    """[T, S] -> means over tiles, at most _MAP_SIDE on a side."""
    for axis, length in enumerate(shares.shape):
        starts = np.arange(0, length, math.ceil(length / _MAP_SIDE))
        counts = np.diff([*starts, length])
        shares = np.add.reduceat(shares, starts, axis=axis) / np.expand_dims(counts, 1 - axis)
    return shares


def _row_scaled(shares: np.ndarray) -> np.ndarray:
    """Shares of a row's largest as uint8: 255 the largest, 0 only what is not seen at all."""
    largest = shares.max(axis=-1, keepdims=True)
    return np.ceil(255 * np.minimum(shares / np.where(largest > 0, largest, 1.0), 1.0)).astype(np.uint8)


def _packed(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    """A map of attending.json, as uint8."""
    return np.frombuffer(base64.b64decode(packed["base64"]), np.uint8).reshape(packed["shape"])


def show_example(experiment: Experiment, batch: dict[str, jax.Array]) -> dict[str, Any]:
    """The batch's first array, as a text (of tokens, or one line per vector) or an image."""
    inputs = np.asarray(next(iter(batch.values()))[0])
    if isinstance(experiment.task, TextTask):
        return {"text": experiment.task.corpus.decode(inputs[:-1])}  # the last token is only a target
    if inputs.ndim < 3:
        lines = inputs.reshape(len(inputs), -1).round(2).astype(str)
        return {"text": ("\n" if inputs.ndim == 2 else " ").join(map(" ".join, lines))}
    return {"pixels": _packed(np.clip(np.rint(255 * inputs / max(inputs.max(), 1e-30)), 0, 255).astype(np.uint8))}
