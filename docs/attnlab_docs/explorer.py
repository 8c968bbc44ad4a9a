"""The explorer's data: for every setting that its page offers, who sees whom, tiles, operations and state."""

import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import attnlab
from attnlab import masks, nn
from attnlab.catalog import MECHANISMS
from attnlab.show import skips_tiles
from attnlab_docs.mechanisms import weights_of

TILE = 16
HEAD = 64  # of keys and values, of one head
LENGTHS, WINDOWS = (32, 64, 128), (4, 8, 16, 32)
_CAUSAL = (True, False)
# Mechanisms whose mask is that of a window, which `masks` has; of the others it is read off the mechanism.
_WINDOWED = ("local", "dilated", "local-linear", "parallax")


class Kind(NamedTuple):
    """A mechanism of the explorer. controls: option -> its values. call: the primitive and its options, of a setting;
    mixer: the layer, whose operations and state are counted."""

    controls: Mapping[str, tuple[Any, ...]]
    call: Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]
    mixer: Callable[[dict[str, Any]], nn.Attention]


def _layer(cls: Any, **fixed: Any) -> Callable[[dict[str, Any]], nn.Attention]:
    def build(options: dict[str, Any]) -> nn.Attention:
        taken = {"is_causal": False, **fixed, **{name: v for name, v in options.items() if name != "length"}}
        return cls(HEAD, num_heads=1, **taken)

    return build


def _primitive(row: str, **fixed: Any) -> Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]:
    return lambda options: (row, {**fixed, **{name: v for name, v in options.items() if name != "length"}})


def _agents(options: dict[str, Any]) -> nn.Attention:
    return nn.AgentAttention(HEAD, num_heads=1, agents=8, is_causal=options["is_causal"])


def _clusters(options: dict[str, Any]) -> nn.Attention:
    clusters, membership = math.isqrt(options["length"]), "strict"
    return _layer(nn.RoutingAttention, clusters=clusters, membership=membership)(options)


KINDS: dict[str, Kind] = {
    "dot_product": Kind({"is_causal": _CAUSAL}, _primitive("dot_product"), _layer(nn.SoftmaxAttention)),
    "local": Kind(
        {"window": WINDOWS, "stride": (1, 2, 4, 8), "is_causal": _CAUSAL, "sinks": (0, 1, 4)},
        _primitive("local, causal"),
        _layer(nn.LocalAttention),
    ),
    "dilated": Kind(
        {"window": WINDOWS[:3], "dilation": (2, 4, 8), "stride": (1, 2, 4), "is_causal": _CAUSAL},
        _primitive("dilated"),
        _layer(nn.DilatedAttention),
    ),
    "axial": Kind({"axis": (0, 1)}, _primitive("axial"), _layer(nn.AxialAttention)),
    "agent": Kind(
        {"is_causal": _CAUSAL},
        lambda options: ("agent, causal" if options["is_causal"] else "agent", {}),
        _agents,
    ),
    "linear": Kind({"is_causal": _CAUSAL}, _primitive("linear"), _layer(nn.LinearAttention, feature_map="elu")),
    "routing": Kind({"window": WINDOWS, "is_causal": _CAUSAL}, _primitive("routing, strict"), _clusters),
    "local-linear": Kind(
        {"window": (None, *WINDOWS), "is_causal": _CAUSAL}, _primitive("local-linear"), _layer(nn.LocalLinearAttention)
    ),
    "parallax": Kind(
        {"window": (None, *WINDOWS), "is_causal": _CAUSAL}, _primitive("parallax"), _layer(nn.ParallaxAttention)
    ),
    "inline": Kind({}, _primitive("inline"), _layer(nn.InlineAttention, residual=False)),
}


def settings(kind: Kind) -> Iterator[dict[str, Any]]:
    for values in itertools.product(LENGTHS, *kind.controls.values()):
        yield dict(zip(("length", *kind.controls), values))


def seen_by(name: str, options: dict[str, Any]) -> np.ndarray:
    """bool [T, S]. Raises ValueError as attnlab does for a setting that cannot be."""
    row, given = KINDS[name].call(options)
    length, mechanism = options["length"], MECHANISMS[row]
    if name in _WINDOWED:
        arrays = mechanism.inputs(length, batch=1, heads=1)
        jax.eval_shape(lambda arrays: mechanism(arrays, "reference", **given), arrays)  # says what cannot be
        sinks = given.pop("sinks", 0)
        mask = masks.neighborhood((length,), **{**given, "window": given["window"] or length})
        if sinks:
            mask = mask | (masks.causal() & masks.first_keys(sinks))
        return np.asarray(mask.sees((np.arange(length)[:, None],), (np.arange(length)[None],)))
    return np.abs(weights_of(mechanism, length, given, clusters=math.isqrt(length), agents=8)) > 1e-12


def entry(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a setting."""
    try:
        seen = seen_by(name, options)
    except (ValueError, TypeError) as error:
        return {"refused": str(error)}
    length, kind = options["length"], KINDS[name]
    mask = masks.Mask(lambda query, key: seen[query[0], key[0]])
    visited, full = masks.block_map(mask, (length,), (TILE,), (TILE,))
    mixer = kind.mixer(options)
    grid = MECHANISMS[kind.call(options)[0]].inputs(length)["query"].shape[1:-2] if name == "axial" else (length,)
    dense = nn.SoftmaxAttention(HEAD, num_heads=1, is_causal=options.get("is_causal", False))
    return {
        "rows": runs(seen),
        "tiles": "".join(str(int(v) + int(f)) for v, f in zip(visited.ravel(), full.ravel())),
        "pairs": int(seen.sum()),
        "flops": mixer.mechanism_flops(grid),
        "dense": dense.mechanism_flops((length,)),
        "state": mixer.state_size(length),
        "dense_state": dense.state_size(length),
        "skips": skips_tiles(mixer),
        "call": _call(name, options),
    }


def _call(name: str, options: dict[str, Any]) -> str:
    row, given = KINDS[name].call(options)
    function = MECHANISMS[row].function
    defaults = {key: value.default for key, value in inspect.signature(function).parameters.items()}
    # By their texts: Sphinx has put objects that stand for the source's text in the place of defaults.
    shown = {key: value for key, value in given.items() if repr(defaults[key]) != repr(value)}
    names = [key for key, value in defaults.items() if value is inspect.Parameter.empty and key not in given]
    return f"attnlab.{function.__name__}({', '.join([*names, *(f'{k}={v!r}' for k, v in shown.items())])})"


def runs(seen: np.ndarray) -> list[list[Any]]:
    """Rows as [how many alike, [first, last, step, ...]]: arithmetic progressions of keys, relative to the query."""
    rows: list[list[Any]] = []
    for query, row in enumerate(seen):
        pattern = _progressions(np.flatnonzero(row) - query)
        if rows and rows[-1][1] == pattern:
            rows[-1][0] += 1
        else:
            rows.append([1, pattern])
    return rows


def _progressions(keys: np.ndarray) -> list[int]:
    parts: list[int] = []
    start = 0
    while start < len(keys):
        step = int(keys[start + 1] - keys[start]) if start + 1 < len(keys) else 1
        end = start + 1
        while end < len(keys) and keys[end] - keys[end - 1] == step:
            end += 1
        if end - start == 2 and step > 1:  # a lone key before a longer run
            end, step = start + 1, 1
        parts += [int(keys[start]), int(keys[end - 1]), step]
        start = end
    return parts


def key_of(options: Mapping[str, Any]) -> str:
    return "|".join(json.dumps(value) for value in options.values())


def data() -> dict[str, Any]:
    kinds = {}
    for name, kind in KINDS.items():
        entries = {key_of(options): entry(name, options) for options in settings(kind)}
        kinds[name] = {"controls": {"length": LENGTHS, **kind.controls}, "entries": entries}
    return {"version": attnlab.__version__, "tile": TILE, "head": HEAD, "kinds": kinds}


def script() -> str:
    return f"window.ATTNLAB = {json.dumps(data(), separators=(',', ':'))};\n"
