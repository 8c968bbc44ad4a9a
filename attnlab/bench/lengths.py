"""Time and memory of every mechanism against length, beside a dense jax.nn.dot_product_attention in the same run."""

import ctypes
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import catalog

# Not timed: a program that would need more memory than this, or is expected to take longer.
_MOST_BYTES, _MOST_SECONDS = 6 * 2**30, 20.0
# The exponent of time is fitted over lengths from here on, where constant costs no longer show.
_FIT_FROM = 4096

HEADS, HEAD_DIM, AGENTS, WINDOW = 4, 64, 64, catalog.WINDOW
# Beside the catalog's, for comparison: what grows with the square as dense attention does, and the delta rule's memory.
MECHANISMS = {
    **catalog.MECHANISMS,
    **{
        f"{name}, an eighth": dataclasses.replace(
            catalog.MECHANISMS[name],
            large=lambda length: {"query_block": 128, "key_block": 128, "places": max(1, length // 1024)},
        )
        for name in ("block-sparse", "block-sparse, causal")
    },
    "memory, without gates": dataclasses.replace(
        catalog.MECHANISMS["memory"], arrays=catalog.MECHANISMS["memory, per chunk"].arrays
    ),
}
# Functions of query, key, value [1, length, HEADS, HEAD_DIM].
_DENSE: dict[str, dict[str, Any]] = {
    "jax.nn dense, causal": {"is_causal": True},
    f"jax.nn dense, causal (window {WINDOW})": {"is_causal": True, "local_window_size": (WINDOW - 1, 0)},
}
NAMES = [*_DENSE, *MECHANISMS]


def named(*starts: str, names: Sequence[str] = NAMES) -> list[str]:
    """The names that these are, whole or up to a comma."""
    return [name for name in names if any(f"{name},".startswith(f"{start},") for start in starts)]


def _call(name: str, length: int) -> tuple[str, Callable[..., jax.Array], dict[str, Any]]:
    """(label, function of arrays by name, the arrays) at a length."""
    if name in _DENSE:
        shape = (3, 1, length, HEADS, HEAD_DIM)
        arrays = dict(zip(("query", "key", "value"), jax.random.normal(jax.random.key(0), shape)))
        return name, lambda arrays: jax.nn.dot_product_attention(**arrays, **_DENSE[name]), arrays
    mechanism = MECHANISMS[name]
    sizes = {"head_dim": HEAD_DIM, "value_dim": HEAD_DIM, "agents": AGENTS, "clusters": math.isqrt(length)}
    arrays = mechanism.inputs(length, batch=1, heads=HEADS, **sizes)
    options = mechanism.large(length)
    # The label has the options that do not grow with the length.
    fixed = [f"{option} {value}" for option, value in options.items() if value == mechanism.large(4 * length)[option]]
    label = f"{name} ({', '.join(fixed)})" if fixed else name
    return label, lambda arrays: mechanism(arrays, **options), jax.tree.map(jnp.asarray, arrays)


def time_lengths(
    lengths: Sequence[int],
    *,
    only: Sequence[str] = (),
    backward: bool = False,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Times every mechanism of the catalog at every length, float32, 1 sequence of 4 heads of 64.

    Args:
      lengths: ascending.
      only: NAMES, whole or up to a comma; without any, all.
      backward: time the gradient of all arrays as well.
      report: takes a line as each number comes.

    Returns:
      Rows {"mechanism", "length", "seconds" (best of a few; None if it was not run), "temporary_bytes" (what the
      compiled program needs beside its arguments and results)}.
    """
    reuse_freed_memory()
    rows = []
    for name in named(*only) if only else NAMES:
        expected = 0.0
        for previous, length in zip((lengths[0], *lengths), lengths):
            label, function, arrays = _call(name, length)
            compiled = jax.jit(_gradient(function) if backward else function).lower(arrays).compile()
            memory: Any = compiled.memory_analysis()
            temporary = memory.temp_size_in_bytes
            expected *= (length / previous) ** 2
            fits = temporary <= _MOST_BYTES and expected <= _MOST_SECONDS
            seconds = _best_time(compiled, arrays) if fits else None
            expected = seconds if seconds is not None else expected
            rows.append({"mechanism": label, "length": length, "seconds": seconds, "temporary_bytes": temporary})
            shown = "not run" if seconds is None else f"{seconds * 1e3:9.1f} ms"
            report(f"{label:<40} {length:>6}  {shown}  {temporary / 2**20:10.1f} MiB")
    return rows


def reuse_freed_memory() -> None:
    """Has glibc keep what one run frees for the next one.

    It gives buffers above 32 MiB back to the system, which clears them page by page for the next run; that would add up
    to half of the time at long lengths and none at short ones. Where there is no glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, most_mapped, most_arenas = -1, -4, -8  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(most_mapped, 0)
        mallopt(most_arenas, 1)  # arenas of threads hold no large buffers


def _gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda arrays: jnp.sum(function(arrays) ** 2))


def _best_time(compiled: Callable[..., Any], arrays: Any) -> float:
    """Seconds of the fastest of at least 3 runs, and of as many as fit into half a second."""
    jax.block_until_ready(compiled(arrays))
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and len(times) < 30):
        start = time.perf_counter()
        jax.block_until_ready(compiled(arrays))
        times.append(time.perf_counter() - start)
    return min(times)


def exponent(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The slope of log time against log length, over lengths of 4096 and more; NaN with fewer than 2 of them."""
    points = [
        (math.log(row["length"]), math.log(row["seconds"]))
        for row in rows
        if row["mechanism"] == name and row["seconds"] is not None and row["length"] >= _FIT_FROM
    ]
    if len(points) < 2:
        return math.nan
    lengths, seconds = np.array(points).T
    return float(np.polyfit(lengths, seconds, 1)[0])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: milliseconds / MiB by length, and the fitted exponent of time."""
    names = list(dict.fromkeys(row["mechanism"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    lines = [["mechanism", *map(str, lengths), "exponent"], ["---"] + ["---:"] * (len(lengths) + 1)]
    for name in names:
        by_length = {row["length"]: row for row in rows if row["mechanism"] == name}
        cells = []
        for length in lengths:
            row = by_length[length]
            milliseconds = "–" if row["seconds"] is None else f"{row['seconds'] * 1e3:.1f}"
            cells.append(f"{milliseconds} / {row['temporary_bytes'] / 2**20:.0f}")
        slope = exponent(rows, name)
        lines.append([name, *cells, "" if math.isnan(slope) else f"{slope:.2f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(rows: Sequence[dict[str, Any]], folder: Path, title: str) -> None:
    """Writes folder/bench.jsonl, bench.md and bench.png."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bench.md").write_text(f"# {title}\n\nMilliseconds / temporary MiB by length.\n\n{table(rows)}\n")
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(row["mechanism"] for row in rows)):
        mine = [row for row in rows if row["mechanism"] == name]
        timed = [row for row in mine if row["seconds"] is not None]
        # Ten colours, then the same with another marker.
        style = {
            "color": f"C{number % 10}",
            "marker": "os"[number // 10 % 2],
            "linestyle": "--" if name.startswith("jax.nn") else "-",
            "label": name,
        }
        left.plot([row["length"] for row in timed], [row["seconds"] for row in timed], **style)
        right.plot([row["length"] for row in mine], [row["temporary_bytes"] / 2**20 for row in mine], **style)
    for axes, label in ((left, "seconds"), (right, "temporary memory (MiB)")):
        axes.set(xscale="log", yscale="log", xlabel="length", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.2)
    figure.suptitle(title)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "bench.png", dpi=110)
