"""The primitives as the attention of Flax's own layers."""

import inspect
from collections.abc import Callable
from typing import Any

import jax

from attnlab.attention._shared.checks import require, shape_text

Array = jax.Array


def attention_fn(primitive: Callable[..., Any], **options: Any) -> Callable[..., Array]:
    """A primitive as flax.nnx.MultiHeadAttention(attention_fn=...) takes it; flax.linen's layers take it too.

        nnx.MultiHeadAttention(8, 512, attention_fn=attention_fn(attnlab.local_attention, window=128), rngs=rngs)

    The layer's mask, bias and is_causal=True are passed on to a primitive that has them, is_causal=False leaves the
    primitive's own; Flax's cache is a mask. What the primitive cannot do raises ValueError: masks of others, dropout of
    attention weights, weights to look at, a precision. All but the last two axes are [B, *space], as the primitive has
    them.

    Args:
      primitive: of attnlab, of heads query, key and value, and with one array as its result.
      options: of the primitive, by name.
    """
    name, taken = getattr(primitive, "__name__", "the primitive"), inspect.signature(primitive).parameters
    others = {option: kind for option, kind in taken.items() if option not in ("query", "key", "value")}
    for option in options:
        require(option in others, option, repr(options[option]), f"{name} takes {', '.join(others)}")
    for option, kind in others.items():
        require(option in options or kind.default is not kind.empty, option, "nothing", f"{name} needs it")

    def attend(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> Array:
        needed: dict[str, Any] = {}
        for argument, array in (("bias", bias), ("mask", mask)):
            if array is not None:
                hint = "; give is_causal=True or segment_ids, and the layer decode=False" * (argument == "mask")
                require(argument in others, argument, shape_text(array), f"{name} takes none{hint}")
                require(argument not in options, argument, shape_text(array), "attention_fn was given one already")
                needed[argument] = array.astype(bool) if argument == "mask" else array  # Flax's masks may be 0 and 1
        if is_causal and options.get("is_causal") is not True:
            require("is_causal" in others, "is_causal", True, f"{name} has no such option")
            needed["is_causal"] = True
        drops = dropout_rate > 0.0 and not deterministic
        require(not drops, "dropout_rate", dropout_rate, f"{name} drops no attention weights; need 0")
        require(precision is None, "precision", precision, f"{name} chooses its own; need None")
        require(module is None, "sow_weights", True, f"{name} keeps no attention weights; need False")
        heads = (x if dtype is None else x.astype(dtype) for x in (query, key, value))
        out = primitive(**dict(zip(("query", "key", "value"), heads)), **(options | needed))
        require(isinstance(out, jax.Array), "primitive", f"{name} with {len(out)} results", "need one array")
        return out

    return attend
