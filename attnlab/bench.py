"""Time and memory of every mechanism against length, beside a dense jax.nn.dot_product_attention in the same run; and
how fast a language model of each causal mixer reads a prompt."""

import ctypes
import functools
import itertools
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

from attnlab import catalog, nn
from attnlab.models import LanguageModel

# Not timed: a program that would need more memory than this, or is expected to take longer.
_MOST_BYTES, _MOST_SECONDS = 6 * 2**30, 20.0
# The exponent of time is fitted over lengths from here on, where constant costs no longer show.
_FIT_FROM = 4096

HEADS, HEAD_DIM, AGENTS, WINDOW = 4, 64, 64, catalog.WINDOW
# Beside the catalog, for comparison: functions of query, key, value [1, length, HEADS, HEAD_DIM].
_DENSE: dict[str, dict[str, Any]] = {
    "jax.nn dense, causal": {"is_causal": True},
    f"jax.nn dense, causal (window {WINDOW})": {"is_causal": True, "local_window_size": (WINDOW - 1, 0)},
}
NAMES = [*_DENSE, *catalog.MECHANISMS]


def named(*starts: str, names: Sequence[str] = NAMES) -> list[str]:
    """The names that these are, whole or up to a comma."""
    return [name for name in names if any(f"{name},".startswith(f"{start},") for start in starts)]


def _call(name: str, length: int) -> tuple[str, Callable[..., jax.Array], dict[str, Any]]:
    """(label, function of arrays by name, the arrays) at a length."""
    if name in _DENSE:
        shape = (3, 1, length, HEADS, HEAD_DIM)
        arrays = dict(zip(("query", "key", "value"), jax.random.normal(jax.random.key(0), shape)))
        return name, lambda arrays: jax.nn.dot_product_attention(**arrays, **_DENSE[name]), arrays
    mechanism = catalog.MECHANISMS[name]
    sizes = {"head_dim": HEAD_DIM, "value_dim": HEAD_DIM, "agents": AGENTS, "clusters": math.isqrt(length)}
    arrays = mechanism.inputs(length, batch=1, heads=HEADS, **sizes)
    options = mechanism.large(length)
    # The label has the options that do not grow with the length.
    fixed = [f"{option} {value}" for option, value in options.items() if value == mechanism.large(4 * length)[option]]
    label = f"{name} ({', '.join(fixed)})" if fixed else name
    return label, lambda arrays: mechanism(arrays, **options), jax.tree.map(jnp.asarray, arrays)


def bench(
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
    _reuse_freed_memory()
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


# --- Prompts ----------------------------------------------------------------------------------------------------------

# Causal mixers by what they are of a length.
_MIXERS: dict[str, Callable[[int], Callable[..., nn.Attention]]] = {
    "softmax": lambda length: nn.SoftmaxAttention,
    "local": lambda length: functools.partial(nn.LocalAttention, window=WINDOW),
    "dilated": lambda length: functools.partial(nn.DilatedAttention, window=64, dilation=8),
    "linear, elu": lambda length: functools.partial(nn.LinearAttention, feature_map="elu", normalize=True),
    "linear, taylor2": lambda length: functools.partial(
        nn.LinearAttention, feature_map="taylor2", normalize=True, head_dim=16, value_dim=32
    ),
    "linear, retention": lambda length: functools.partial(nn.LinearAttention, decay="retention", rotary=True),
    "linear, gated": lambda length: functools.partial(nn.LinearAttention, decay="data"),
    "linear, gated by channel": lambda length: functools.partial(nn.LinearAttention, decay="channel"),
    "linear, delta": lambda length: functools.partial(nn.LinearAttention, beta=1.0, convolution=4),
    "linear, gated delta": lambda length: functools.partial(nn.LinearAttention, beta=1.0, decay="data", convolution=4),
    "agent": lambda length: functools.partial(nn.AgentAttention, agents=AGENTS),
    "routing": lambda length: functools.partial(
        nn.RoutingAttention, clusters=math.isqrt(length), window=math.isqrt(length)
    ),
    "local-linear": lambda length: nn.LocalLinearAttention,
    "local-linear, window": lambda length: functools.partial(nn.LocalLinearAttention, window=WINDOW),
    "parallax": lambda length: nn.ParallaxAttention,
    "parallax, window": lambda length: functools.partial(nn.ParallaxAttention, window=WINDOW),
}
MIXERS = list(_MIXERS)
_FEATURES, _DEPTH = 768, 12  # of GPT-2 small: a step reads 340 MB of weights, as those of models that people use do
_STEPS = 32  # that are timed; the others cost the same


def prompts(
    lengths: Sequence[int], *, only: Sequence[str] = (), report: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Times how a language model of 85 M parameters reads a prompt: at once, in a compiled loop, and by calls of step.

    only: MIXERS, whole or up to a comma; without any, all. report: takes a line as the numbers of a mixer come.

    Returns:
      Rows {"mixer", "length", "seconds" (at once), "loop_seconds" and "call_seconds" (one step's)}, each the best of
      three that are timed in turn.
    """
    _reuse_freed_memory()
    rows = []
    chosen = named(*only, names=MIXERS) if only else MIXERS
    for name, length in itertools.product(chosen, lengths):
        model = LanguageModel(vocabulary=256, mixers=[_MIXERS[name](length)], depth=_DEPTH, features=_FEATURES)
        values = nn.initialize(model, jax.random.key(0))
        tokens = jax.random.randint(jax.random.key(1), (1, length), 0, 256)
        ways = _ways_to_read(model, values, tokens)
        times = [[_seconds(way) for way in ways] for _ in range(4)][1:]
        once, loop, calls = np.min(times, axis=0).tolist()
        steps = min(length, _STEPS)
        row = {"mixer": name, "length": length, "seconds": once, "loop_seconds": loop / steps}
        rows.append(row | {"call_seconds": calls / steps})
        report(prompt_table(rows[-1:]).splitlines()[-1])
    return rows


def _ways_to_read(model: LanguageModel, values: nn.Parameters, tokens: jax.Array) -> list[Callable[[], Any]]:
    """At once, and some steps in a loop and call by call."""
    length = tokens.shape[1]
    first = tokens[:, :_STEPS].T

    def at_once(values: nn.Parameters, tokens: jax.Array) -> Any:
        return nn.bind(model, values).prefill(tokens, max_length=length)

    def step(values: nn.Parameters, cache: Any, token: jax.Array) -> Any:
        return nn.bind(model, values).step(cache, token)

    def in_loop(values: nn.Parameters, tokens: jax.Array) -> Any:
        cache = model.init_cache(1, length)
        return jax.lax.scan(lambda cache, token: step(values, cache, token)[::-1], cache, tokens)

    compiled = jax.jit(step, donate_argnums=1)

    def by_calls() -> Any:
        cache = jax.tree.map(jnp.array, model.init_cache(1, length))
        for token in first:
            logits, cache = compiled(values, cache, token)
        return logits, cache

    whole, loop = jax.jit(at_once), jax.jit(in_loop)
    return [lambda: whole(values, tokens), lambda: loop(values, first), by_calls]


def _seconds(way: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(way())
    return time.perf_counter() - start


def prompt_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: milliseconds to read a prompt, and how many times faster it is at once."""
    lines = ["| mixer | tokens | at once | a loop of steps | times | a call per step | times |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = [row["mixer"], str(row["length"]), f"{row['seconds'] * 1e3:.1f}"]
        for way in ("loop_seconds", "call_seconds"):
            seconds = row[way] * row["length"]
            cells += [f"{seconds * 1e3:.0f}", f"{seconds / row['seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_prompts(rows: Sequence[dict[str, Any]], folder: Path, title: str) -> None:
    """Writes folder/prompts.jsonl and prompts.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = (
        f"Milliseconds. A language model of {_DEPTH} layers of width {_FEATURES}, float32, one prompt. Windows are "
        f"{WINDOW} (dilated: 64 of every 8th), agents {AGENTS}, clusters and their windows the root of the length. Of "
        f"the steps {_STEPS} are timed; the others cost the same. Made by `attnlab bench --prompts`."
    )
    (folder / "prompts.md").write_text(f"# {title}\n\n{setting}\n\n{prompt_table(rows)}\n")


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
