"""Capacity: how many pairs a memory gives back after one pass over them, against the width of its keys.

N keys and N values, uniform on the unit sphere of d dimensions and independent of each other, are written once, in
turn. Then every key is read, and the error is |out_j - v_j|^2, the mean over the N pairs. In expectation

    linear      S = sum_j k_j v_j^T                    (N - 1) / d

    delta rule  S_t = (I - k_t k_t^T) S_{t-1} + k_t v_t^T
                                                       the mean over j = 1 .. N, with n = N - j pairs after j, of
                                                       2 - 3 r^n + a_n + (1 - r^(j-1)) (r^n - a_n),  r = 1 - 1/d,
                                                       a_0 = 1, a_{n+1} = (1 - 2 (d+1)/(d (d+2))) a_n + r^n/(d (d+2))

    softmax     weights ~ exp(sqrt(d) k_i . k_j)       about (x / (1 + x))^2 (1 + e / (N - 1)),
                                                       x = (N - 1) e^(1/2 - sqrt(d))

The first two are exact. Linear: of each other pair a share k_i . k_j is read, whose square is 1/d in the mean (with
Gaussian keys of variance 1/d the key's own length varies too, and the error is (N + 1) / d). Delta rule: with
u = P_{j+1} .. P_N k_j, P_t = I - k_t k_t^T, the means of |u|^2 and of u . k_j are r^n, and a_n is that of (u . k_j)^2;
the own pair adds 1 - 2 r^n + a_n, later ones 1 - r^n, earlier ones the rest. Softmax: sqrt(d) k_i . k_j is taken as
normal, and sums as their means, which needs N and d large.

Linear attention as such a memory, and bounds of what it keeps: Qiao 2025.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab.ablate import paired_difference
from attnlab.regress.page import write_page

DIMS = (8, 16, 32, 64, 128)
COUNTS = tuple(2**power for power in range(1, 10))
# The error up to which a pair counts as kept: half of the value is there, or is someone else's.
KEPT = 0.25
_SHOWN = 32  # the width whose errors the table has


def _linear(key: jax.Array, value: jax.Array, scale: jax.Array) -> jax.Array:
    return attnlab.linear_attention(key, key, value, is_causal=False, scale=1.0)


def _delta(key: jax.Array, value: jax.Array, scale: jax.Array) -> jax.Array:
    beta = jnp.ones(key.shape[:3], key.dtype)
    _, state = attnlab.linear_attention(key, key, value, beta=beta, return_state=True)
    return jnp.einsum("btnf,bnfv->btnv", key, state.kv)


def _softmax(key: jax.Array, value: jax.Array, scale: jax.Array) -> jax.Array:
    return attnlab.dot_product_attention(scale[:, None, None, None] * key, key, value, scale=1.0)


def _linear_error(count: int, dim: int) -> float:
    return (count - 1) / dim


def _delta_error(count: int, dim: int) -> float:
    later = np.arange(count)  # pairs after the one that is read
    whole, before = (1 - 1 / dim) ** later, 1 - (1 - 1 / dim) ** later[::-1]
    own = [1.0]
    for length in whole[:-1]:
        own.append((1 - 2 * (dim + 1) / (dim * (dim + 2))) * own[-1] + length / (dim * (dim + 2)))
    return float(np.mean(2 - 3 * whole + own + before * (whole - own)))


def _softmax_error(count: int, dim: int) -> float:
    others = (count - 1) * math.exp(0.5 - dim**0.5)
    return (others / (1 + others)) ** 2 * (1 + math.e / (count - 1))


class _Memory(NamedTuple):
    """recall: key, value [B, N, 1, H], scale [B] -> what each key reads. expected: its error, of (N >= 2, d)."""

    recall: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    expected: Callable[[int, int], float]


MEMORIES = {
    "linear": _Memory(_linear, _linear_error),
    "delta rule": _Memory(_delta, _delta_error),
    "softmax": _Memory(_softmax, _softmax_error),
}


def draw(seed: int, count: int, dim: int, *, pairs: int = COUNTS[-1]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of unit length, [pairs // count, count, dim]: sequences of so many of the same pairs."""
    drawn = np.random.default_rng(seed).normal(size=(2, pairs, dim))
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    key, value = drawn[:, : pairs // count * count].reshape(2, -1, count, dim)
    return key, value


def errors(
    name: str, count: int, *, dims: Sequence[int], seeds: Sequence[int], dtype: Any = np.float32, **sizes: int
) -> np.ndarray:
    """The mean error over the pairs: [dims, seeds]. All widths are one call: zeros beyond a width change no product."""

    def padded(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, 0), (0, max(dims) - x.shape[-1])))

    drawn = [map(padded, draw(seed, count, dim, **sizes)) for dim in dims for seed in seeds]
    key, value = (np.concatenate(x).astype(dtype)[:, :, None] for x in zip(*drawn))
    scale = np.repeat(np.sqrt(dims), len(key) // len(dims)).astype(dtype)
    out = np.asarray(jax.jit(MEMORIES[name].recall)(key, value, scale))
    return np.sum((out - value) ** 2, axis=-1).reshape(len(dims), len(seeds), -1).mean(axis=-1)


def measure(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Rows {"memory", "dim", "pairs", "error", "low", "high" (a 95 % interval of the mean), "expected"}."""
    rows = []
    for (name, memory), count in itertools.product(MEMORIES.items(), COUNTS):
        for dim, found in zip(DIMS, errors(name, count, dims=DIMS, seeds=seeds).tolist()):
            mean = paired_difference(dict(zip(seeds, found)), dict.fromkeys(seeds, 0.0))
            row = {"memory": name, "dim": dim, "pairs": count}
            row |= {"error": mean.mean, "low": mean.low, "high": mean.high}
            rows.append(row | {"expected": memory.expected(count, dim)})
    return rows


def _crossing(counts: Sequence[int], found: Sequence[float]) -> float:
    """How many pairs have an error of KEPT, on the line through log (N - 1) and log error; inf if none has as much."""
    if found[-1] < KEPT:
        return math.inf
    above = next(i for i, error in enumerate(found) if error >= KEPT)
    if above == 0:
        return math.nan
    ends = slice(above - 1, above + 1)
    return 1 + math.exp(np.interp(math.log(KEPT), np.log(found[ends]), np.log(np.array(counts[ends]) - 1)))


def capacities(rows: Sequence[dict[str, Any]], name: str, *, of: str = "error") -> dict[int, float]:
    """By width: the pairs at which the error, or what is expected, reaches KEPT."""
    found = {}
    for dim in dict.fromkeys(row["dim"] for row in rows):
        mine = [row for row in rows if row["memory"] == name and row["dim"] == dim]
        found[dim] = _crossing([row["pairs"] for row in mine], [row[of] for row in mine])
    return found


def _lines(table: Sequence[Sequence[str]]) -> str:
    head, *rest = table
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rest))


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the pairs kept by width, and the errors of one width; the theory beside each."""

    def number(value: float) -> str:
        return f"> {COUNTS[-1]}" if value == math.inf else f"{value:.1f}"

    kept = [["width", *(f"{name}{part}" for name in MEMORIES for part in ("", ", theory"))]]
    found = {(name, of): capacities(rows, name, of=of) for name in MEMORIES for of in ("error", "expected")}
    kept += [[str(dim), *(number(by_dim[dim]) for by_dim in found.values())] for dim in DIMS]
    shown: dict[int, list[str]] = {}
    for row in rows:
        if row["dim"] == _SHOWN:
            reach = "" if math.isnan(row["low"]) else f" ± {row['high'] - row['error']:.3f}"
            shown.setdefault(row["pairs"], []).extend([f"{row['error']:.3f}{reach}", f"{row['expected']:.3f}"])
    of_width = [["pairs", *kept[0][1:]], *([str(count), *cells] for count, cells in shown.items())]
    return f"Pairs at an error of {KEPT}:\n\n{_lines(kept)}\n\nErrors at width {_SHOWN}:\n\n{_lines(of_width)}"


def draw_picture(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Errors against the number of pairs, a panel for each memory; and the pairs kept against the width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels: Any = figure.subplots(1, len(MEMORIES) + 1)
    for axes, name in zip(panels, MEMORIES):
        for number, dim in enumerate(DIMS):
            mine = [row for row in rows if row["memory"] == name and row["dim"] == dim]
            error = [row["error"] for row in mine]
            reach = np.nan_to_num([row["high"] - row["error"] for row in mine])
            colour = f"C{number}"
            axes.errorbar(COUNTS, error, reach, fmt="o", markersize=4, color=colour, label=f"width {dim}")
            axes.plot(COUNTS, [row["expected"] for row in mine], color=colour, linewidth=1)
        axes.axhline(KEPT, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=name, xlabel="pairs written", yscale="log", ylim=(1e-3, 200))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("relative squared error of recall")
    axes = panels[-1]
    for number, name in enumerate(MEMORIES):
        colour = f"C{len(DIMS) + number}"
        found = {dim: count for dim, count in capacities(rows, name).items() if count < math.inf}
        axes.plot([*found], [*found.values()], "o", markersize=5, color=colour, label=name)
        expected = {dim: count for dim, count in capacities(rows, name, of="expected").items() if count < math.inf}
        axes.plot([*expected], [*expected.values()], color=colour, linewidth=1)
    axes.set(title=f"capacity: pairs at an error of {KEPT}", xlabel="width of keys", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False)
    axes.grid(alpha=0.2)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(DIMS), frameon=False, title="lines: theory")
    figure.savefig(file, dpi=110)


def write(folder: Path, *, seeds: Sequence[int], command: str) -> str:
    """Writes folder/capacity.md, capacity.jsonl and capacity.png, and gives the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = measure(seeds)
    draw_picture(rows, folder / "capacity.png")
    shown = tables(rows)
    note = (
        "Pairs of a key and a value, uniform on the unit sphere, are written once; then every key is read. The error "
        "is squared and relative. Theory: (N - 1) / d for the linear memory and a longer sum for the delta rule, both "
        "exact in expectation; for softmax at its usual scale an estimate for many pairs and wide keys "
        "(attnlab/regress/capacity.py). Qiao (2025) claims that a linear memory keeps of the order of the root of the "
        f"width at worst, and of the width in the mean. {len(seeds)} seeds of {COUNTS[-1]} pairs, the same in every "
        "row, so that rows deviate together; 95 % intervals."
    )
    title = "Capacity of associative memories, nothing trained"
    write_page(folder, "capacity", title=title, note=note, shown=shown, command=command, rows=rows)
    return shown
