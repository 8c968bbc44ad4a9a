"""What the TPU kernels share: the shape of a register, the budgets of memory, products, and dtypes of constants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

LANES = 128
SUBLANES = 8
# What a kernel may take by its model of VMEM; the compiler is held to it too. It is libtpu's limit for v5e and v5p.
VMEM_BUDGET = 16 * 2**20
# Scalar memory that tables may take, in bytes; v5e and v5p have 1 MiB.
SMEM_BUDGET = 512 * 2**10


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """The product of two matrices over these axes, in float32; of float32 operands at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def in_two(x: Array, dtype: Any) -> tuple[Array, Array]:
    """x, float32, as two numbers of this dtype, of 16 bits, whose sum it is to about 2^-16 of it."""
    high = x.astype(dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


def zero() -> np.int32:
    """For index maps: a Python int would be an int64 under jax_enable_x64."""
    return np.int32(0)


def varying(*arrays: Array) -> Any:
    """Inside shard_map: the results of a kernel differ over the mesh axes over which any argument does."""
    return jax.sharding.ManualAxisType(
        varying=frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))
    )


def padded_width(width: int) -> int:
    """What a head dim is padded to: 64 or a multiple of 128."""
    return 64 if width <= 64 else round_up(width, LANES)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def heads_first(x: Array, length: int, width: int) -> Array:
    """[B, L, N, H] -> [B, N, length, width], padded with 0."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, width - x.shape[3])))


def tokens_first(x: Array, length: int, width: int) -> Array:
    """The inverse of heads_first: [B, N, L', H'] -> [B, length, N, width]."""
    return jnp.swapaxes(x[:, :, :length, :width], 1, 2)
