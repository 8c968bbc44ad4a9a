"""Pictures of a model's mixers: who sees whom, which tiles of keys that touches, and how far a stack reaches."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import nn
from attnlab.attention import masks
from attnlab.errors import UserError
from attnlab.models import ImageClassifier, LanguageModel
from attnlab.nn.mixers.base import check_weights

# Positions on a side of the tiles that are counted as visited.
_TILE = 16
# Tiles by how much of them is seen, with their colours.
_TILES = {"nothing seen": "#f7fbff", "partly seen": "#6baed6", "wholly seen": "#08306b"}


def show(model: LanguageModel | ImageClassifier, path: Path, *, length: int = 128, seed: int = 0) -> None:
    """Draws every kind of layer of a model as it is initialised, and the receptive field of the whole stack.

    Args:
      model: its mixers are given random inputs; image models over their own grid, language models over `length` tokens.
      path: the picture, .png, .svg or .pdf.
      length: tokens, for a language model.
      seed: of the parameters and inputs.

    Raises UserError: a mixer is not linear in its values, so that no weights say what it takes of each.
    """
    from matplotlib.figure import Figure

    space = model.grid if isinstance(model, ImageClassifier) else (length,)
    bound = nn.bind(model, nn.initialize(model, jax.random.key(seed)))
    weights = [np.asarray(_weights(block.mixer, space, seed)) for block in bound.layers]
    kinds = _kinds(bound)
    figure = Figure(figsize=(11, 3.6 * (len(kinds) + 1)), layout="constrained")
    rows: Any = figure.subfigures(len(kinds) + 1, 1)
    for row, layers in zip(rows, kinds.values()):
        _draw_layer(row, bound.layers[layers[0]].mixer, layers, weights[layers[0]], space)
    _draw_reach(rows[-1], [weight > 0 for weight in weights], space)
    figure.savefig(path, dpi=110)


def _weights(mixer: nn.Attention, space: tuple[int, ...], seed: int) -> jax.Array:
    """Mean size of the weights over heads and a few random inputs, [T, S]."""
    x = jax.random.normal(jax.random.key(seed), (4, *space, mixer.features))
    weights = jax.jit(lambda x: mixer.attention_weights(x))(x)
    try:
        check_weights(type(mixer).__name__, weights)
    except ValueError as error:
        raise UserError(f"show: {error}") from error
    return jnp.mean(jnp.abs(weights), axis=(0, 1))


def _kinds(model: Any) -> dict[str, list[int]]:
    """Layers by kind: those of one class with equal options are one."""
    kinds: dict[str, list[int]] = {}
    for layer, block in enumerate(model.layers):
        # A sum's options are those of its mixers.
        parts = [module for _, module in nnx.iter_modules(block.mixer) if isinstance(module, nn.Attention)]
        kinds.setdefault(" + ".join(map(_kind, parts)), []).append(layer)
    return kinds


def _kind(mixer: nn.Attention) -> str:
    options = {name: value for name, value in vars(mixer).items() if isinstance(value, (int, str, tuple, float))}
    return f"{type(mixer).__name__} {options}"


def _draw_layer(row: Any, mixer: nn.Attention, layers: list[int], weights: np.ndarray, space: tuple[int, ...]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    positions = len(weights)
    seen = weights > 0
    who, tiles = row.subplots(1, 2)
    numbers = ", ".join(map(str, layers))
    row.suptitle(f"{type(mixer).__name__}, layer {numbers}: {seen.sum() / positions:.1f} of {positions} keys per query")
    order = " (raster order)" if len(space) > 1 else ""
    scaled = weights / np.maximum(weights.max(axis=1, keepdims=True), 1e-30)
    image = who.imshow(np.where(seen, scaled, np.nan), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    who.set(title="who sees whom, at initialisation", xlabel=f"key{order}", ylabel="query")
    row.colorbar(image, ax=who, label="weight / the query's largest")
    padded = np.pad(seen, (0, -positions % _TILE))  # so that a last tile that is cut off is never full
    mask = masks.Mask(lambda query, key: padded[query[0], key[0]])
    visited, full = masks.block_map(mask, padded.shape[:1], (_TILE,), (_TILE,))
    tiles.imshow(visited.astype(int) + full, cmap=ListedColormap([*_TILES.values()]), vmin=0, vmax=2)
    tiles.locator_params(integer=True)
    patches = [Patch(facecolor=colour, edgecolor="gray", label=label) for label, colour in _TILES.items()]
    tiles.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    title = f"tiles of {_TILE} x {_TILE}: {visited.sum()} of {visited.size} seen into, {full.sum()} wholly"
    if skips_tiles(mixer):
        title += f";\nskipping the others is at most {visited.size / max(visited.sum(), 1):.1f} times faster"
    tiles.set(
        title=title,
        xlabel="tile of keys",
        ylabel="tile of queries",
    )


def skips_tiles(mixer: nn.Attention) -> bool:
    """Whether the mixer passes over tiles that no query sees into.

    Others reorder the keys, or keep a state of fixed size, and their time does not follow from the tiles.
    """
    if isinstance(mixer, (nn.LocalLinearAttention, nn.ParallaxAttention)):
        return mixer.window is not None
    return isinstance(mixer, (nn.SoftmaxAttention, nn.LocalAttention)) and not isinstance(mixer, nn.DilatedAttention)


def _draw_reach(row: Any, seen: list[np.ndarray], space: tuple[int, ...]) -> None:
    """For one query, the positions that its output depends on after each layer."""
    positions = len(seen[0])
    query = positions - 1 if len(space) == 1 else int(np.ravel_multi_index([length // 2 for length in space], space))
    reach = np.eye(positions, dtype=bool)[query]
    steps = [reach]
    # From the last layer back to the first: what its inputs depend on, and so on.
    for layer in reversed(seen):
        reach = reach | (reach @ layer)
        steps.append(reach)
    if len(space) == 1:
        axes = row.subplots()
        axes.imshow(np.array(steps), cmap="Blues", aspect="auto", interpolation="nearest", vmin=0, vmax=1.4)
        axes.set(xlabel="token", ylabel="layers passed", yticks=range(len(steps)))
        row.suptitle(f"receptive field of the last token: {int(reach.sum())} of {positions} tokens")
        return
    for axes, step, number in zip(np.atleast_1d(row.subplots(1, len(steps))), steps, range(len(steps))):
        axes.imshow(step.reshape(space), cmap="Blues", interpolation="nearest", vmin=0, vmax=1.4)
        axes.set(title=f"{number} layer{'s' * (number != 1)}: {int(step.sum())}", xticks=[], yticks=[])
    row.suptitle(f"receptive field of the position in the middle, of {positions} positions")
