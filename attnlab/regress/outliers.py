"""Outliers: what a memory's objective saves of recall where some values that it reads are noise.

16 keys of unit length have a value each, of independent normal entries. The pairs are read once, or each 16 times in a
mixed order; in 5 % of the readings the value is noise of 10 times the size. Then every key is asked for its value. The
error is relative, |out - v|^2 / E|v|^2; of pairs that are read once, those count whose value was the right one.

The memory is linear, from zero, written token by token. Miras (Behrouz et al. 2025) proposes objectives that grow more
slowly than the square, as these trust single values less: "huber" by channel, "huber_norm" on the whole vector (Yaad),
("lp", p) with a p below 2; its Moneta has p = 3, which trusts them more. Rates, and thresholds, of each are those with
the least error on a seed that is not among those of the mean.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab.ablate import paired_difference
from attnlab.regress.page import write_page

WIDTH = PAIRS = 16
SHARES = (0.0, 0.05)
READINGS = (1, 16)
_SIZE = 10.0  # of the noise
_SEQUENCES = 16  # of a seed
# Not among the seeds of a mean, which are counted from 0.
_SEARCHED = 2**31
_RATES = tuple(2.0**-power for power in range(15))


class Objective(NamedTuple):
    """skips: writes nothing where the value is noise, which no memory can know: the best that another one could do."""

    objective: Any = "l2"
    thresholds: tuple[float, ...] = (1.0,)
    skips: bool = False


BASELINE = "l2"
OBJECTIVES = {
    BASELINE: Objective(),
    "huber": Objective("huber", (0.25, 0.5, 1.0, 2.0, 4.0)),
    "huber_norm": Objective("huber_norm", (1.0, 2.0, 4.0, 8.0, 16.0)),
    "lp, p = 1.5": Objective(("lp", 1.5)),
    "lp, p = 3": Objective(("lp", 3.0)),
    "l2, noise left out": Objective(skips=True),
}


class Sequences(NamedTuple):
    """key, value: [B, PAIRS, WIDTH]. order: [B, T], the pair that each token is. is_noise: bool [B, T]; noise: [B, T,
    WIDTH], which is in the value's place there."""

    key: np.ndarray
    value: np.ndarray
    order: np.ndarray
    is_noise: np.ndarray
    noise: np.ndarray

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values as they are read: [B, T, WIDTH]."""
        key, value = (np.take_along_axis(x, self.order[..., None], axis=1) for x in (self.key, self.value))
        return key, np.where(self.is_noise[..., None], self.noise, value)


def draw(seeds: Sequence[int], share: float, readings: int, *, sequences: int = _SEQUENCES) -> Sequences:
    """So many sequences of each seed."""
    drawn = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        key, value = rng.normal(size=(2, sequences, PAIRS, WIDTH))
        key /= np.linalg.norm(key, axis=-1, keepdims=True)
        order = np.argsort(rng.random((sequences, PAIRS * readings)), axis=1) % PAIRS
        noise = _SIZE * rng.normal(size=(*order.shape, WIDTH))
        drawn.append((key, value, order, rng.random(order.shape) < share, noise))
    return Sequences(*(np.concatenate(arrays) for arrays in zip(*drawn)))


@functools.partial(jax.jit, static_argnames="objective")
def _recall(key: Any, tokens: Any, values: Any, rate: Any, threshold: Any, objective: Any) -> jax.Array:
    """rate, threshold: [B, T]."""
    needs_threshold = isinstance(objective, str) and objective.startswith("huber")
    _, state = attnlab.memory_attention(
        tokens[:, :, None],
        tokens[:, :, None],
        values[:, :, None],
        {"w": jnp.zeros((1, WIDTH, WIDTH), key.dtype)},
        rate=rate[..., None],
        objective=objective,
        threshold=threshold[..., None] if needs_threshold else None,
        chunk_size=1,
        return_state=True,
    )
    return jnp.einsum("bph,bhv->bpv", key, state.weights["w"][:, 0])


def errors(name: str, drawn: Sequences, rate: float, threshold: float, *, dtype: Any = np.float32) -> np.ndarray:
    """The mean error over the pairs of each sequence, [B]; NaN where no pair counts, inf where the memory diverged."""
    objective, is_noise = OBJECTIVES[name], drawn.is_noise
    rates = np.where(is_noise, 0, rate) if objective.skips else np.full(is_noise.shape, rate)
    arrays = (drawn.key, *drawn.tokens(), rates, np.full(is_noise.shape, threshold))
    out = _recall(*(x.astype(dtype) for x in arrays), objective=objective.objective)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.sum((np.asarray(out, np.float64) - drawn.value) ** 2, axis=-1) / WIDTH
    error = np.where(np.isfinite(error), error, np.inf)
    if is_noise.shape[1] > PAIRS:
        return error.mean(axis=1)
    counts = np.zeros(error.shape, bool)
    np.put_along_axis(counts, drawn.order, ~is_noise, axis=1)
    total = np.maximum(counts.sum(axis=1), 1)
    return np.where(counts.any(axis=1), np.where(counts, error, 0).sum(axis=1) / total, np.nan)


def search(name: str, share: float, readings: int) -> tuple[float, float]:
    """The rate and the threshold with the least error on the seed of the search."""
    drawn = draw([_SEARCHED], share, readings)
    tried = itertools.product(_RATES, OBJECTIVES[name].thresholds)
    return min(tried, key=lambda options: np.nanmean(errors(name, drawn, *options)))


def measure(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Rows {"share", "readings", "objective", "rate", "threshold", "error", "difference", "low", "high"}: the mean
    error, and that less the baseline's, paired by seed, with its 95 % interval."""
    rows = []
    for share, readings in itertools.product(SHARES, READINGS):
        baseline: dict[int, float] = {}
        for name in OBJECTIVES:
            rate, threshold = search(name, share, readings)
            found = errors(name, draw(seeds, share, readings), rate, threshold).reshape(len(seeds), -1)
            by_seed = dict(zip(seeds, np.nanmean(found, axis=1).tolist()))
            baseline = baseline or by_seed
            less = paired_difference(by_seed, baseline)
            row: dict[str, Any] = {"share": share, "readings": readings, "objective": name, "rate": rate}
            row["threshold"] = threshold if len(OBJECTIVES[name].thresholds) > 1 else None
            row |= {"error": float(np.mean(list(by_seed.values()))), "difference": less.mean}
            rows.append(row | {"low": less.low, "high": less.high})
    return rows


def _setting(share: float, readings: int) -> str:
    return f"{share:.0%} noise, pairs read {'once' if readings == 1 else f'{readings} times'}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each setting and objective."""
    head = ["setting", "objective", "rate", "threshold", "error", f"less {BASELINE}'s", "95 % interval"]
    lines = [head, ["---"] * 2 + ["---:"] * 5]
    for row in rows:
        less = [
            f"{row['difference']:+.3f}",
            "" if math.isnan(row["low"]) else f"{row['low']:+.3f} to {row['high']:+.3f}",
        ]
        limit = "" if row["threshold"] is None else f"{row['threshold']:g}"
        found = [f"{row['rate']:.3g}", limit, f"{row['error']:.3f}"]
        own = row["objective"] == BASELINE
        lines.append([_setting(row["share"], row["readings"]), row["objective"], *found, *(["", ""] if own else less)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_picture(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """The errors of every objective, without noise and with it, a panel for each number of readings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, len(READINGS), sharey=True)
    width = 0.8 / len(SHARES)
    for axes, readings in zip(panels, READINGS):
        for number, share in enumerate(SHARES):
            mine = [row for row in rows if row["readings"] == readings and row["share"] == share]
            places = np.arange(len(mine)) + width * (number - (len(SHARES) - 1) / 2)
            axes.bar(places, [row["error"] for row in mine], width, label=f"{share:.0%} of the values are noise")
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(OBJECTIVES)), [*OBJECTIVES], rotation=25, ha="right")
        axes.set(title=f"pairs read {'once' if readings == 1 else f'{readings} times'}")
        axes.grid(alpha=0.2, axis="y")
    panels[0].set_ylabel("relative squared error of recall")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHARES), frameon=False)
    figure.savefig(file, dpi=110)


def write(folder: Path, *, seeds: Sequence[int], command: str) -> str:
    """Writes folder/outliers.md, outliers.jsonl and outliers.png, and gives the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = measure(seeds)
    draw_picture(rows, folder / "outliers.png")
    shown = table(rows)
    note = (
        f"{PAIRS} pairs with keys of width {WIDTH}; the noise is {_SIZE:g} times as large as a value. Errors are "
        "squared and relative; a memory of zeros has 1. Miras (Behrouz et al. 2025) claims that objectives which grow "
        f"more slowly than the square protect a memory from outliers. {len(seeds)} seeds of {_SEQUENCES} sequences; "
        "rates and thresholds were searched on another seed."
    )
    title = "Recall with outliers among the values, nothing trained"
    write_page(folder, "outliers", title=title, note=note, shown=shown, command=command, rows=rows)
    return shown
