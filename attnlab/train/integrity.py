"""What a checkpoint is checked by: a sum over the bits of each array, and whether its numbers are finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Examined(NamedTuple):
    """Of one array. sum: below 2**32, which no change of a single 32-bit word leaves as it was."""

    sum: int
    is_finite: bool
    has_nan: bool


def examine(tree: Any) -> dict[str, Examined]:
    """Each array by path. Any dtype, keys of jax.random too; sharded in any way, which changes nothing. O(size).

    The sum, modulo 2**32, is of words mixed one-to-one with their index (the finaliser of MurmurHash3).
    """
    found = {}
    for path, array in jax.tree.leaves_with_path(tree):
        # One after the other: CPUs of several processes block for ever where two programs with collectives overlap.
        total, is_finite, has_nan = jax.device_get(_examine(array))
        found[jax.tree_util.keystr(path)] = Examined(int(total), bool(is_finite), bool(has_nan))
    return found


@jax.jit  # one program per shape and dtype, of which a model has few
def _examine(array: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    if not _is_inexact(array):
        return _sum(array), jnp.array(True), jnp.array(False)
    return _sum(array), jnp.all(jnp.isfinite(array)), jnp.any(jnp.isnan(array))


def _is_inexact(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _sum(array: jax.Array) -> jax.Array:
    words = _words(array)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = words ^ (index * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The array's bits as uint32, of its shape, or with a last axis more where an element takes several words."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return _words(jax.random.key_data(array))
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return _words(jnp.stack([array.real, array.imag], axis=-1))
    if array.dtype == jnp.bool_ or _bits(array) < 8:  # of which nothing smaller than a byte can be taken apart
        array = array.astype(jnp.float32 if _is_inexact(array) else jnp.int8)
    size = min(array.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)


def _bits(array: jax.Array) -> int:
    return (jnp.finfo if _is_inexact(array) else jnp.iinfo)(array.dtype).bits
