"""Test-time regression: what untrained attention learns of a linear map from the examples in its context.

    v_t = W_segment k_t        query_t = k_{t+1}, to be answered with v_{t+1} from the pairs up to t

The map changes from segment to segment, so that old pairs mislead. Keys of unit length are either drawn around a centre
of their segment ("clustered") or uniformly on the sphere. The error is relative, |out - v|^2 / |v|^2, over the last
quarter of every segment (Zuo et al. 2025, Local Linear Attention). Nothing is trained; mechanisms are compared at one
bandwidth, exp(sqrt(H) q . k).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab.regress.page import write_page

Keys = Literal["clustered", "sphere"]
KEYS: tuple[Keys, ...] = ("clustered", "sphere")
# Spread of clustered keys around their centre, before they are made unit length.
_SPREAD = 0.5


def _delta(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return attnlab.linear_attention(query, key, value, beta=jnp.ones(key.shape[:3]), scale=1.0)


def _scale(key: jax.Array) -> float:
    return key.shape[-1] ** 0.5


# By name: a function of query, key, value [B, T, 1, H], causal.
MECHANISMS: dict[str, Callable[..., jax.Array]] = {
    "local-linear": lambda q, k, v: attnlab.local_linear_attention(q, k, v, ridge=0.01, scale=_scale(k)),
    "softmax": lambda q, k, v: attnlab.dot_product_attention(q, k, v, is_causal=True, scale=_scale(k)),
    "delta rule": _delta,
    "linear": lambda q, k, v: attnlab.linear_attention(q, k, v, feature_map="elu", normalize=True, scale=1.0),
}


def draw(
    seed: int, keys: Keys, *, length: int = 512, segment: int = 64, dim: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [length, dim], float32."""
    rng = np.random.default_rng(seed)
    segments = np.arange(length) // segment
    noise = rng.normal(size=(length, dim))
    if keys == "clustered":
        centres = rng.normal(size=(segments[-1] + 1, dim))
        centres /= np.linalg.norm(centres, axis=-1, keepdims=True)
        noise = centres[segments] + _SPREAD * noise / dim**0.5
    key = noise / np.linalg.norm(noise, axis=-1, keepdims=True)
    maps = rng.normal(size=(segments[-1] + 1, dim, dim)) / dim**0.5
    value = np.einsum("tij,tj->ti", maps[segments], key)
    return key.astype(np.float32), value.astype(np.float32)


def errors(keys: Keys, *, seeds: Sequence[int] = range(20), segment: int = 64, **sizes: int) -> dict[str, np.ndarray]:
    """Relative squared errors by mechanism: [seeds, length - 1], of the value after each token."""
    key, value = (np.stack(x)[:, :, None] for x in zip(*(draw(seed, keys, segment=segment, **sizes) for seed in seeds)))
    target = value[:, 1:, 0]
    found = {}
    for name, mechanism in MECHANISMS.items():
        out = np.asarray(jax.jit(mechanism)(key[:, 1:], key[:, :-1], value[:, :-1]))[:, :, 0]
        found[name] = np.sum((out - target) ** 2, -1) / np.sum(target**2, -1)
    return found


def summary(found: dict[str, np.ndarray], *, segment: int = 64) -> dict[str, tuple[float, float]]:
    """By mechanism: the mean error over the last quarter of the first segment, and of the later ones."""
    position = np.arange(1, 1 + next(iter(found.values())).shape[1])
    late, first = position % segment >= 3 * segment // 4, position < segment
    return {name: (error[:, late & first].mean(), error[:, late & ~first].mean()) for name, error in found.items()}


def table(summaries: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Markdown: one row per mechanism; for each kind of keys the first segment and the later ones."""
    head = ["mechanism", *(f"{keys}, {part}" for keys in summaries for part in ("first segment", "later ones"))]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name in MECHANISMS:
        lines.append([name, *(f"{value:.3f}" for each in summaries.values() for value in each[name])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(folder: Path, *, seeds: Sequence[int], command: str) -> str:
    """Writes folder/regression.md and regression.png, and gives the table."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, len(KEYS), sharey=True)
    summaries: dict[str, dict[str, tuple[float, float]]] = {}
    for axes, keys in zip(panels, KEYS):
        found = errors(keys, seeds=seeds)
        summaries[keys] = summary(found)
        for name, error in found.items():
            axes.plot(np.arange(1, 1 + error.shape[1]), error.mean(axis=0), label=name, linewidth=1.2)
        axes.set(
            title={"clustered": "keys clustered by segment", "sphere": "keys on the sphere"}[keys],
            xlabel="tokens seen",
            yscale="log",
        )
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("relative squared error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(folder / "regression.png", dpi=110)
    shown = table(summaries)
    note = (
        "Relative squared error over the last quarter of the segments; the map changes every 64 tokens. "
        f"{len(seeds)} seeds."
    )
    title = "Test-time regression, nothing trained"
    write_page(folder, "regression", title=title, note=note, shown=shown, command=command)
    return shown
