"""Argument checks shared by the primitives. All of them run at trace time, on shapes and dtypes alone."""

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def shape_text(array: Any) -> str:
    return f"{jnp.dtype(array.dtype).name}[{','.join(map(str, array.shape))}]"


def kind_text(value: Any) -> str:
    """What a value of a wrong type is: an array by its shape, which may be traced, all else by its type."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return shape_text(value) if is_array else type(value).__name__


def require(condition: bool, argument: str, given: Any, allowed: str) -> None:
    """Raises ValueError "argument: got given; allowed", the one form of message in this package."""
    if not condition:
        raise ValueError(f"{argument}: got {given}; {allowed}")


def shown(value: Any) -> str:
    """A value in a message: on one line, and cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_int(name: str, value: Any, *, least: int | None = None, most: int | None = None, of: Any = None) -> int:
    """The value as an int: Python's and numpy's integers, never bools. `of`: what was given, if value is a part of it.

    Raises TypeError for another type, ValueError below `least` or above `most`; both name the argument and what was
    given.
    """
    given = value if of is None else of
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {shown(given)}; need an int")
    number = int(value)
    require(_is_within(number, least, most), name, shown(given), f"need {_range(least, most)}")
    return number


def check_block(name: str, value: Any) -> int:
    """A number of tokens, from 1."""
    return check_int(name, value, least=1, most=2**31 - 1)


def check_dividing_blocks(query_block: Any, key_block: Any) -> tuple[int, int]:
    """Tokens in a block of queries and of keys, one of which divides the other."""
    query_block, key_block = check_block("query_block", query_block), check_block("key_block", key_block)
    divides = max(query_block, key_block) % min(query_block, key_block) == 0
    require(divides, "query_block", query_block, f"need one of it and key_block, {key_block}, to divide the other")
    return query_block, key_block


def check_group_sizes(sizes: Any, block: int | None = None) -> tuple[int, ...]:
    """How many tokens are seen as one: 1 first, growing, and where a block is given each divides it."""
    if not (isinstance(sizes, (tuple, list)) and sizes):
        raise TypeError(f"sizes: got {shown(sizes)}; need a tuple of ints")
    checked = tuple(check_int("sizes", size, least=1, of=sizes) for size in sizes)
    grows = checked[0] == 1 and all(a < b for a, b in itertools.pairwise(checked))
    require(grows, "sizes", shown(sizes), "need 1 first, and growing numbers")
    divides = block is None or all(block % size == 0 for size in checked)
    require(divides, "sizes", shown(sizes), f"need divisors of key_block, {block}")
    return checked


def check_fractions(fractions: Any, count: int | None = None) -> tuple[float, ...]:
    """Cumulative shares, 0 to 1, so many if a count is given."""
    if not (isinstance(fractions, (tuple, list)) and fractions):
        raise TypeError(f"fractions: got {shown(fractions)}; need a tuple of numbers")
    checked = tuple(check_float("fractions", fraction, least=0, most=1) for fraction in fractions)
    require(list(checked) == sorted(checked), "fractions", shown(fractions), "need numbers that do not fall")
    fits = count in (None, len(checked))
    require(fits, "fractions", shown(fractions), f"need one for each of {count} sizes")
    return checked


def check_ints(name: str, value: Any, *, least: int = 1, layout: tuple[str, ...] = ()) -> Any:
    """An option per axis: an int, or a tuple of ints (a list as well), each at least `least`.

    layout: what each is, where there must be as many; () takes a single int, or any number of them. Raises as check_int
      does.
    """
    if isinstance(value, (tuple, list)) and value:
        require(len(value) == len(layout or value), name, shown(value), f"need ({', '.join(layout)})")
        return tuple(check_int(name, item, least=least, of=value) for item in value)
    if layout:
        raise TypeError(f"{name}: got {shown(value)}; need ({', '.join(layout)})")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {shown(value)}; need an int, or one per axis")
    return check_int(name, value, least=least)


def check_items(name: str, value: Any, item: str) -> tuple[Any, ...]:
    """A tuple or list of at least one item, as a tuple; the items are the caller's to check."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: got {shown(value)}; need a tuple, one {item} each")
    require(len(value) > 0, name, shown(value), f"need at least one {item}")
    return tuple(value)


def check_float(
    name: str, value: Any, *, least: float | None = None, most: float | None = None, above: float | None = None
) -> float:
    """The value as a float: real numbers of Python and numpy that float32 holds, never bools, NaN or infinity.

    Raises TypeError for another type, ValueError for a number out of range; both name the argument and what was given.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {shown(value)}; need a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    is_finite = abs(number) <= float(np.finfo(np.float32).max)  # False of NaN
    is_inside = _is_within(number, least, most) and (above is None or number > above)
    allowed = f"above {above:g}" if above is not None else _range(least, most)
    if above is not None and most is not None:
        allowed += f" and at most {most:g}"
    require(bool(is_finite and is_inside), name, shown(value), f"need a finite number, {allowed}".removesuffix(", "))
    return number


def _is_within(value: Any, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _range(least: float | None, most: float | None) -> str:
    if least is None:
        return "" if most is None else f"at most {most}"
    return f"at least {least}" if most is None else f"{least} to {most}"


def check_bool(name: str, value: Any) -> bool:
    """The value as a bool, numpy's too; raises TypeError for all else, 0, 1 and "false" among it."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {shown(value)}; need True or False")
    return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of these strings; raises TypeError for what is no string, else ValueError."""
    allowed = f"need one of {', '.join(choices)}"
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {shown(value)}; {allowed}")
    require(value in choices, name, shown(value), allowed)
    return value


def check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {shown(value)}; need a string")
    return value


def check_dtype(name: str, value: Any) -> Any:
    """A floating dtype, or its name; as it was given."""
    try:
        is_floating = value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except (TypeError, ValueError):
        is_floating = False
    if not is_floating or jnp.dtype(value).itemsize < 2:
        raise TypeError(f"{name}: got {shown(value)}; need a floating dtype of 16 bits or more, such as 'bfloat16'")
    if jnp.dtype(value).itemsize > 4 and not jax.config.read("jax_enable_x64"):
        raise TypeError(f"{name}: got {shown(value)}; needs jax_enable_x64, which is off")
    return value


def keep(instance: Any, **checked: Any) -> None:
    """Sets fields of a frozen dataclass to what the checks above gave for them, Python's own numbers."""
    for name, value in checked.items():
        object.__setattr__(instance, name, value)


def check_type(name: str, value: Any, kind: type, maker: str) -> None:
    """Requires a NamedTuple of arrays, as the function `maker` gives it."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise TypeError(f"{name}: got {kind_text(value)}; need {article} {kind.__name__}, as {maker} gives it")


def check_sizes(**sizes: Any) -> list[Any]:
    """Sizes of an array, by argument: ints of at least 1, whose product a machine can address."""
    symbolic = {name: size for name, size in sizes.items() if jax.export.is_symbolic_dim(size)}
    checked = {name: check_int(name, size, least=1) for name, size in sizes.items() if name not in symbolic}
    largest = max(checked, key=lambda name: checked[name], default=None)
    if largest is None:
        return list(sizes.values())
    require(checked[largest] < 2**31, largest, checked[largest], "need less than 2^31")
    require(math.prod(checked.values()) < 2**46, largest, checked[largest], "needs more memory than there is")
    return [(symbolic | checked)[name] for name in sizes]


def check_array(name: str, array: Any, shape: Sequence[int | None], layout: str) -> None:
    """Requires an array of this shape (None: any length). `layout` names the axes in the message."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{name}: got {type(array).__name__}; need an array {layout}")
    fits = len(array.shape) == len(shape) and all(
        want is None or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    wanted = ",".join("*" if n is None else str(n) for n in shape)
    require(fits, name, shape_text(array), f"need {layout} = [{wanted}]")


def check_floating(name: str, array: Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: got dtype {array.dtype}; need a floating dtype")


def check_over_logits(bias: Any, mask: Any, sizes: tuple[Any, ...]) -> None:
    """Checks what there is of a bias and a mask [B|1, N|1, T|1, S|1]; sizes: B, N, T and S."""
    for name, array, kind in (("bias", bias, jnp.floating), ("mask", mask, jnp.bool_)):
        if array is None:
            continue
        check_array(name, array, (None,) * 4, "[batch|1, heads|1, T|1, S|1]")
        if not jnp.issubdtype(array.dtype, kind):
            hint = "a bool mask (True = attend)" if name == "mask" else "a floating bias; give a bool array as mask="
            raise TypeError(f"{name}: got dtype {array.dtype}; need {hint}")
        fits = all(got in (1, want) for got, want in zip(array.shape, sizes, strict=True))
        require(fits, name, shape_text(array), f"need [batch|1, heads|1, T|1, S|1] of {list(sizes)}")


def check_key_mask(mask: Any, shape: Sequence[int | None], layout: str) -> None:
    check_array("key_mask", mask, shape, layout)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"key_mask: got dtype {mask.dtype}; need a bool mask (True = attend)")


def check_query_key_value(
    query: Array,
    key: Array,
    value: Array,
    *,
    space_ranks: Sequence[int] = (1,),
    same_space: bool = True,
    needs_tokens: bool = True,
) -> None:
    """Checks query [B,*T,N,H], key [B,*S,K,H], value [B,*S,K,V]: floating dtypes, ranks, lengths and heads.

    space_ranks: numbers of space axes allowed. same_space: whether query and key must have equal space axes.
    needs_tokens: whether a query of no tokens is refused.
    """
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name}: got {type(array).__name__}; need an array [batch, *space, heads, head_dim]")
        check_floating(name, array)
        ranks = " or ".join(str(rank + 3) for rank in space_ranks)
        require(
            array.ndim - 3 in space_ranks,
            name,
            shape_text(array),
            f"need rank {ranks}: [batch, *space, heads, head_dim]",
        )
        require(0 not in array.shape[-2:], name, shape_text(array), "heads and head_dim must be at least 1")
        require(array.shape[0] != 0, name, shape_text(array), "batch must be at least 1")
    require(0 not in query.shape or not needs_tokens, "query", shape_text(query), "need at least one token")
    require(key.ndim == query.ndim, "key", shape_text(key), f"must have the rank of query {shape_text(query)}")
    require(key.shape[0] == query.shape[0], "key", shape_text(key), f"must have query's batch, {query.shape[0]}")
    require(key.shape[-1] == query.shape[-1], "key", shape_text(key), f"must have query's head_dim, {query.shape[-1]}")
    require(
        value.shape[:-1] == key.shape[:-1],
        "value",
        shape_text(value),
        f"must agree with key {shape_text(key)} in all but head_dim",
    )
    require(
        query.shape[-2] % key.shape[-2] == 0,
        "key",
        shape_text(key),
        f"its heads must divide query's {query.shape[-2]} heads",
    )
    if same_space:
        require(
            key.shape[1:-2] == query.shape[1:-2],
            "key",
            shape_text(key),
            f"must have query's space axes, {query.shape[1:-2]}",
        )


def per_axis(name: str, value: Any, rank: int, kind: type = int) -> tuple[Any, ...]:
    """One value, or one per space axis -> a tuple of `rank` values of type int (>= 1 is not checked here) or bool."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    require(len(values) == rank, name, value, f"need one value or {rank}, one per space axis")
    bools = (bool, np.bool_)
    integral = bools if kind is bool else numbers.Integral
    if not all(isinstance(item, integral) and isinstance(item, bools) == (kind is bool) for item in values):
        raise TypeError(f"{name}: got {value!r}; need {kind.__name__}, or one {kind.__name__} per space axis")
    return tuple(kind(item) for item in values)


def check_segment_ids(name: str, ids: Any, shape: tuple[int, ...], layout: str) -> None:
    check_array(name, ids, shape, layout)
    check_integers(name, ids)


def check_segment_pair(
    segment_ids: Array | tuple[Array, Array] | None, batch: int, queries: int, keys: int
) -> tuple[Array, Array] | None:
    """Ids of one run of tokens, or of queries and of keys, as a pair [B, T], [B, S]."""
    if segment_ids is None:
        return None
    if isinstance(segment_ids, (tuple, list)):
        require(len(segment_ids) == 2, "segment_ids", f"{len(segment_ids)} arrays", "need one, or (query's, key's)")
        query_ids, key_ids = segment_ids
    else:
        query_ids = key_ids = segment_ids
    check_segment_ids("segment_ids", query_ids, (batch, queries), "[batch, T]")
    check_segment_ids("segment_ids", key_ids, (batch, keys), "[batch, S] (a pair gives T and S ids of their own)")
    return query_ids, key_ids


def check_step(query: Array, key: Array, value: Array) -> None:
    """Checks one token's query [B,1,N,H], key [B,1,K,H] and value [B,1,K,V]."""
    check_query_key_value(query, key, value)
    require(query.shape[1] == 1, "query", shape_text(query), "a step takes one token, [batch, 1, heads, head_dim]")


def check_cached_step(query: Array, key: Array, value: Array, cached_key: Array, cached_value: Array) -> None:
    """Checks one token's arrays against a cache's [B,*,K,H] and [B,*,K,V]."""
    check_step(query, key, value)
    _check_layout(key, value, cached_key, cached_value)


def check_cached_steps(query: Array, key: Array, value: Array, cached_key: Array, cached_value: Array) -> None:
    """Checks the arrays of T tokens, at least one, against a cache's [B,*,K,H] and [B,*,K,V]."""
    check_query_key_value(query, key, value)
    _check_layout(key, value, cached_key, cached_value)


def _check_layout(key: Array, value: Array, cached_key: Array, cached_value: Array) -> None:
    tokens = key.shape[1]
    for name, new, old in (("key", key, cached_key), ("value", value, cached_value)):
        layout = f"the cache's layout, {shape_text(old)}, {tokens} token{'s' * (tokens > 1)}"
        check_array(name, new, (old.shape[0], tokens, *old.shape[2:]), layout)


def check_position(name: str, position: Any, batch: int) -> None:
    """A cache's number of tokens: integers [], or [batch], one per row."""
    is_count = hasattr(position, "shape") and jnp.issubdtype(position.dtype, jnp.integer)
    allowed = f"need integers [], or [batch] = [{batch}]"
    require(is_count and position.shape in ((), (batch,)), name, _given(position), allowed)


def known_values(array: Any) -> np.ndarray | None:
    """The values of an array that is known without waiting for a device; None of others, traced ones among them."""
    if isinstance(array, np.ndarray):
        return array
    is_here = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.is_fully_addressable
    return np.asarray(array) if is_here and array.is_ready() else None


def check_integers(name: str, array: Any) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {array.dtype}; need an integer dtype")


def check_queries_keys(queries: Any, keys: Any) -> None:
    """Checks queries [B,n,N,H] and keys [B,m,K,H], both floating, K divides N."""
    layout = "[batch, blocks, heads, width]"
    for name, array in (("queries", queries), ("keys", keys)):
        check_array(name, array, (None,) * 4, layout)
        check_floating(name, array)
        require(0 not in array.shape[2:], name, shape_text(array), "heads and width must be at least 1")
    batch, _, heads, width = queries.shape
    check_array("keys", keys, (batch, None, None, width), layout)
    check_key_heads("keys", keys, heads)


def check_key_heads(name: str, keys: Array, heads: int) -> None:
    """[.., K, H]: K divides the number of query heads."""
    fits = keys.shape[-2] > 0 and heads % keys.shape[-2] == 0
    require(fits, name, shape_text(keys), f"need key heads that divide {heads}")


def check_lengths(lengths: Any, batch: int, *, most: int | None = None) -> Array | None:
    """How many tokens of each row count, int32 [batch]; None, which is all, stays.

    most: with a number, values that are known already are checked, 1 to it. In a compiled program none are.
    """
    if lengths is None:
        return None
    check_array("lengths", lengths, (batch,), "[batch]")
    check_integers("lengths", lengths)
    if most is not None and not isinstance(lengths, jax.core.Tracer) and getattr(lengths, "is_fully_addressable", True):
        outside = [length for length in np.asarray(lengths).tolist() if not 1 <= length <= most]
        require(not outside, "lengths", shown(outside[:1])[1:-1], f"need 1 to {most}")
    return jnp.asarray(lengths, jnp.int32)


def check_prompt(key: Array, value: Array, cached_key: Array, cached_value: Array, lengths: Any) -> Array | None:
    """Checks a prompt's key [B,P,K,H] and value [B,P,K,V] against a cache's [B,*,K,H] and [B,*,K,V]; gives lengths."""
    for name, new, old in (("key", key, cached_key), ("value", value, cached_value)):
        check_array(name, new, (old.shape[0], None, *old.shape[-2:]), "[batch, tokens] and the cache's heads")
        check_floating(name, new)
    require(key.shape[1] > 0, "key", shape_text(key), "need at least one token")
    require(value.shape[1] == key.shape[1], "value", shape_text(value), f"need key's tokens, {key.shape[1]}")
    return check_lengths(lengths, key.shape[0])


def _given(value: Any) -> str:
    return shape_text(value) if hasattr(value, "shape") and hasattr(value, "dtype") else shown(value)


def default_scale(scale: float | Array | None, head_dim: int) -> float | Array:
    """The scale, a real number or a real array of no axes; None means head_dim ** -0.5."""
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, (jax.Array, np.ndarray)):
        return check_float("scale", scale)
    require(scale.shape == (), "scale", shape_text(scale), "need a number, or an array of no axes")
    if not (jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)):
        raise TypeError(f"scale: got dtype {scale.dtype}; need a real number")
    return scale


def check_softcap(softcap: Any) -> float | None:
    return None if softcap is None else check_float("softcap", softcap, above=0)


def check_sink_logits(sink_logits: Any, heads: int) -> None:
    if sink_logits is not None:
        check_array("sink_logits", sink_logits, (heads,), "[heads]")
        check_floating("sink_logits", sink_logits)


def accumulator_dtype(*arrays: Array) -> jnp.dtype:
    """float32 for inputs of 32 bits and fewer, float64 for float64 (under jax_enable_x64)."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*arrays))
