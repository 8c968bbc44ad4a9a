"""Time and memory of every mechanism against length, beside a dense jax.nn.dot_product_attention in the same run."""

import ctypes
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

import attnlab

WINDOW = 256
# Not timed: a program that would need more memory than this, or is expected to take longer.
_MOST_BYTES, _MOST_SECONDS = 6 * 2**30, 20.0
# The exponent of time is fitted over lengths from here on, where constant costs no longer show.
_FIT_FROM = 4096


def _agents(q: jax.Array) -> jax.Array:
    """[64, N, H]: as many fixed agents, made of queries."""
    return q[0, :: q.shape[1] // 64][:64]


def _square(x: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, Y, X, N, H], as square as a power of two allows."""
    rows = 2 ** (int(math.log2(x.shape[1])) // 2)
    return x.reshape(x.shape[0], rows, -1, *x.shape[2:])


def _routing(q: jax.Array, k: jax.Array, v: jax.Array, membership: Any) -> jax.Array:
    clusters = math.isqrt(q.shape[1])
    state = attnlab.init_routing(jax.random.key(1), q.shape[2], clusters, q.shape[3])
    out, _ = attnlab.routing_attention(q, k, v, state, window=clusters, is_causal=True, membership=membership)
    return out


# By name: a function of query, key, value [1, length, 4, 64]; causal unless named otherwise.
MECHANISMS: dict[str, Callable[..., jax.Array]] = {
    "jax.nn dense": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
    f"jax.nn dense, window {WINDOW}": lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(WINDOW - 1, 0)
    ),
    "dot_product": lambda q, k, v: attnlab.dot_product_attention(q, k, v, is_causal=True),
    f"local, window {WINDOW}": lambda q, k, v: attnlab.local_attention(q, k, v, window=WINDOW, is_causal=True),
    f"dilated, window {WINDOW // 4}, dilation 4": lambda q, k, v: attnlab.dilated_attention(
        q, k, v, window=WINDOW // 4, dilation=4, is_causal=True
    ),
    "routing, strict": lambda q, k, v: _routing(q, k, v, "strict"),
    "routing, global": lambda q, k, v: _routing(q, k, v, "global"),
    "axial, rows of an image": lambda q, k, v: attnlab.axial_attention(*map(_square, (q, k, v)), axis=1),
    "agent, 64 agents": lambda q, k, v: attnlab.causal_agent_attention(q, k, v, _agents(q)),
    "agent, 64 agents, not causal": lambda q, k, v: attnlab.agent_attention(q, k, v, _agents(q)),
    "linear, elu": lambda q, k, v: attnlab.linear_attention(q, k, v, feature_map="elu", normalize=True),
    "linear, retention": lambda q, k, v: attnlab.linear_attention(
        q, k, v, log_decay=attnlab.retention_log_decay(q.shape[2])
    ),
    "linear, delta rule": lambda q, k, v: attnlab.linear_attention(
        q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, beta=jnp.full(q.shape[:3], 0.5)
    ),
    "inline, not causal": attnlab.inline_attention,
    f"local-linear, window {WINDOW}": lambda q, k, v: attnlab.local_linear_attention(
        q, k, v, ridge=10.0, window=WINDOW
    ),
    f"parallax, window {WINDOW}": lambda q, k, v: attnlab.parallax_attention(q, q, k, v, window=WINDOW),
}


def bench(
    lengths: Sequence[int],
    *,
    only: Sequence[str] = (),
    backward: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Times every mechanism at every length, float32, 1 sequence of 4 heads of 64.

    Args:
      lengths: ascending.
      only: names in MECHANISMS, whole or up to a comma; without any, all.
      backward: time the gradient of query, key and value as well.
      say: takes a line as each number comes.

    Returns:
      Rows {"mechanism", "length", "seconds" (best of a few; None if it was not run), "temporary_bytes" (what the
      compiled program needs beside its arguments and results)}.
    """
    _reuse_freed_memory()
    rows = []
    for name, function in MECHANISMS.items():
        if only and not any(f"{name},".startswith(f"{start},") for start in only):
            continue
        expected = 0.0
        for previous, length in zip((lengths[0], *lengths), lengths):
            arrays = jax.random.normal(jax.random.key(0), (3, 1, length, 4, 64))
            compiled = jax.jit(_gradient(function) if backward else function).lower(*arrays).compile()
            memory: Any = compiled.memory_analysis()
            temporary = memory.temp_size_in_bytes
            expected *= (length / previous) ** 2
            fits = temporary <= _MOST_BYTES and expected <= _MOST_SECONDS
            seconds = _best_time(compiled, arrays) if fits else None
            expected = seconds if seconds is not None else expected
            rows.append({"mechanism": name, "length": length, "seconds": seconds, "temporary_bytes": temporary})
            shown = "not run" if seconds is None else f"{seconds * 1e3:9.1f} ms"
            say(f"{name:<36} {length:>6}  {shown}  {temporary / 2**20:10.1f} MiB")
    return rows


def _reuse_freed_memory() -> None:
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
    return jax.grad(lambda q, k, v: jnp.sum(function(q, k, v) ** 2), (0, 1, 2))


def _best_time(compiled: Callable[..., Any], arrays: jax.Array) -> float:
    """Seconds of the fastest of at least 3 runs, and of as many as fit into half a second."""
    jax.block_until_ready(compiled(*arrays))
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and len(times) < 30):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
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
