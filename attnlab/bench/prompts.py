"""How fast a language model of each causal mixer reads a prompt: at once, and token by token."""

import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import nn
from attnlab.bench.lengths import AGENTS, WINDOW, named, reuse_freed_memory
from attnlab.models import LanguageModel

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
_STEPS = 32  # that are timed, in the middle of the prompt
_PATIENCE = 120  # seconds of the first round, which compiles: after a longer one there is one more, else three


def time_prompts(
    lengths: Sequence[int], *, only: Sequence[str] = (), report: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Times how a language model of 85 M parameters reads a prompt: at once, in a compiled loop, and by calls of step.

    only: MIXERS, whole or up to a comma; without any, all. report: takes all rows so far, whenever one comes.

    Returns:
      Rows {"mixer", "length", "seconds" (at once), "loop_seconds" and "call_seconds" (one step's)}, each the best of
      three that are timed in turn (of minutes: of one).
    """
    reuse_freed_memory()
    rows = []
    chosen = named(*only, names=MIXERS) if only else MIXERS
    for name, length in itertools.product(chosen, lengths):
        model = LanguageModel(vocabulary=256, mixers=[_MIXERS[name](length)], depth=_DEPTH, features=_FEATURES)
        values = nn.initialize(model, jax.random.key(0))
        tokens = jax.random.randint(jax.random.key(1), (1, length), 0, 256)
        ways = _ways_to_read(model, values, tokens, steps := min(length, _STEPS))
        compiling = sum(map(_seconds, ways))
        times = [[_seconds(way) for way in ways] for _ in range(3 if compiling < _PATIENCE else 1)]
        once, loop, calls = np.min(times, axis=0).tolist()
        row = {"mixer": name, "length": length, "seconds": once, "loop_seconds": loop / steps}
        rows.append(row | {"call_seconds": calls / steps})
        report(rows)
    return rows


def _ways_to_read(
    model: LanguageModel, values: nn.Parameters, tokens: jax.Array, steps: int
) -> list[Callable[[], Any]]:
    """At once, and so many steps in a loop and call by call: those in the middle, as some grow with the prompt."""
    length = tokens.shape[1]
    start = (length - steps) // 2
    middle = tokens[:, start : start + steps].T

    def at_once(values: nn.Parameters, tokens: jax.Array) -> Any:
        return nn.bind(model, values).prefill(tokens, max_length=length)

    def step(values: nn.Parameters, cache: Any, token: jax.Array) -> Any:
        return nn.bind(model, values).step(cache, token)

    def in_loop(values: nn.Parameters, cache: Any, tokens: jax.Array) -> Any:
        return jax.lax.scan(lambda cache, token: step(values, cache, token)[::-1], cache, tokens)

    compiled = jax.jit(step, donate_argnums=1)

    def by_calls() -> Any:
        cache = jax.tree.map(jnp.array, begun)
        for token in middle:
            logits, cache = compiled(values, cache, token)
        return logits, cache

    whole, loop = jax.jit(at_once), jax.jit(in_loop)
    begun = whole(values, tokens[:, :start])[1] if start else model.init_cache(1, length)
    return [lambda: whole(values, tokens), lambda: loop(values, begun, middle), by_calls]


def _seconds(way: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(way())
    return time.perf_counter() - start


def table(rows: Sequence[dict[str, Any]]) -> str:
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


def write(rows: Sequence[dict[str, Any]], folder: Path, title: str) -> None:
    """Writes folder/prompts.jsonl and prompts.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = (
        f"Milliseconds. A language model of {_DEPTH} layers of width {_FEATURES}, float32, one prompt. Windows are "
        f"{WINDOW} (dilated: 64 of every 8th), agents {AGENTS}, clusters and their windows the root of the length. Of "
        f"the steps the {_STEPS} in the middle of the prompt are timed. Made by `attnlab bench --prompts`."
    )
    (folder / "prompts.md").write_text(f"# {title}\n\n{setting}\n\n{table(rows)}\n")
