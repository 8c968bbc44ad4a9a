"""A token of linear attention for Hopper: a state is read once, changed and written.

    S~ = diag(a) S        u = v, or beta (v - S~^T k)        S' = S~ + k u^T        out = q^T S'

A block is one warpgroup that holds up to 128 columns of a head's state in shared memory; a thread has a column, and
goes along its rows. Of 64 columns two rows lie side by side. The step is so short of arithmetic that its time is that
of moving the state: XLA reads it twice for the delta rule, once for the prediction and once for the update.

Numerics: float32 throughout. Two runs give the same bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.common import SMEM_BUDGET, barriers, full, launch, load
from kernels_pallas.gpu.simulation import is_simulated

Array = jax.Array

_LANES = 128  # threads of a warpgroup
_UNROLLED = 8  # rows of a turn, whose loads do not wait for each other
_SPARE_BYTES = 2048  # of shared memory, for predictions and barriers


def smem_bytes(features: int, value_dim: int) -> int:
    """Shared memory of a block."""
    return 4 * _LANES * _rows(features, value_dim) + _SPARE_BYTES


def _rows(features: int, value_dim: int) -> int:
    """Of 128 numbers, that hold the columns of a block; a whole number of turns."""
    rows = -(-features // _beside(value_dim))
    return -(-rows // _UNROLLED) * _UNROLLED


def _beside(value_dim: int) -> int:
    """Rows of the state that lie side by side."""
    return 2 if value_dim <= _LANES // 2 else 1


def refusal(state: Any) -> str | None:
    """Why linear_step cannot serve this state [B, N, F, V], or None if it can."""
    if state.dtype != jnp.float32:
        return f"needs a float32 state, got {state.dtype}"
    if 0 in state.shape:
        return f"needs a state that is not empty, got {state.shape}"
    needed = smem_bytes(*state.shape[2:])
    if needed > SMEM_BUDGET:
        return f"takes {needed / 2**10:.0f} KiB of shared memory, more than {SMEM_BUDGET / 2**10:.0f}"
    return None


def linear_step(
    state: Array, query: Array, key: Array, value: Array, decay: Array | None = None, beta: Array | None = None
) -> tuple[Array, Array]:
    """One token.

    Args:
      state: [B, N, F, V] float32.
      query, key: [B, N, F] float32, after the feature map and the scale. value: [B, N, V] float32.
      decay: [B, N, F] float32, the factor of each of the state's rows, or None for 1.
      beta: [B, N] float32, with the delta rule.

    Returns:
      out [B, N, V] and the new state, both float32.

    Raises:
      ValueError: with refusal()'s reason.

    Complexity: O(B N F V) time; reads and writes the state once. It is copied first where V is neither 64 nor a
    multiple of 128, or F no multiple of 8 (of 16 with a V of 64).
    """
    reason = refusal(state)
    if reason is not None:
        raise ValueError(f"linear_step: {reason}")
    batch, heads, features, value_dim = state.shape
    beside, rows = _beside(value_dim), _rows(features, value_dim)
    columns = _LANES // beside
    parts = -(-value_dim // columns)

    def padded(x: Array, size: int, axis: int) -> Array:
        return jnp.pad(x, [(0, size - length if a == axis else 0) for a, length in enumerate(x.shape)])

    def by_features(x: Array) -> Array:
        return padded(x, rows * beside, 2)

    held = padded(padded(state, rows * beside, 2), parts * columns, 3).reshape(batch, heads, rows, parts * _LANES)
    values = jnp.tile(padded(value, parts * columns, 2), (1, 1, beside))
    arrays = [held, values, by_features(query), by_features(key)]
    arrays += [] if decay is None else [by_features(decay)]
    arrays += [] if beta is None else [beta]
    out, new = launch(
        _body(rows, beside, has_decay=decay is not None, is_delta=beta is not None),
        "linear_step",
        *arrays,
        out=[((batch, heads, parts * _LANES), jnp.float32), (held.shape, jnp.float32)],
        grid={"batch": batch, "head": heads, "part": parts},
        scratch=[plgpu.SMEM((rows, _LANES), jnp.float32), plgpu.SMEM((2 * _LANES,), jnp.float32), barriers(1, 1)],
        warpgroups=1,
    )
    out = jnp.sum(out.reshape(batch, heads, beside, parts * columns), axis=2) if beside > 1 else out
    new = new.reshape(batch, heads, rows * beside, parts * columns)
    return out[..., :value_dim], new[:, :, :features, :value_dim]


def _body(rows: int, beside: int, *, has_decay: bool, is_delta: bool) -> Any:
    def body(held_ref: Any, values_ref: Any, query_ref: Any, key_ref: Any, *refs: Any) -> None:
        *given, out_ref, new_ref, state_s, sums_s, ready = refs
        decay_ref, beta_ref = given[0] if has_decay else None, given[-1] if is_delta else None
        batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
        columns = pl.ds(part * np.int32(_LANES), _LANES)
        plgpu.copy_gmem_to_smem(held_ref.at[batch, head, :, columns], state_s, ready.at[0])
        value = load(values_ref.at[batch, head, columns], _VECTOR)
        plgpu.barrier_wait(ready.at[0])

        def along_rows(ref: Any, row: Array) -> Array:
            """The numbers of ref [B, N, F] for the rows of the state that lie in this one."""
            first = full((_LANES,), ref[batch, head, row * np.int32(beside)], _VECTOR)
            if beside == 1:
                return first
            second = full((_LANES,), ref[batch, head, row * np.int32(beside) + np.int32(1)], _VECTOR)
            return jnp.where(_lane() < np.int32(_LANES // 2), first, second)

        def decayed(row: Array) -> Array:
            now = load(state_s.at[row], _VECTOR)
            return now if decay_ref is None else along_rows(decay_ref, row) * now

        def over_rows(add: Any) -> Array:
            """The sum of add(row), which may write it."""

            def turn(number: Array, total: Array) -> Array:
                for i in range(_UNROLLED):
                    total += add(number * np.int32(_UNROLLED) + np.int32(i))
                return total

            return lax.fori_loop(jnp.int32(0), jnp.int32(rows // _UNROLLED), turn, full((_LANES,), 0.0, _VECTOR))

        update = value
        if beta_ref is not None:
            predicted = over_rows(lambda row: along_rows(key_ref, row) * decayed(row))
            if beside > 1:  # the other half's sum, which other threads have
                sums_s[pl.ds(0, _LANES)] = predicted
                sums_s[pl.ds(_LANES, _LANES)] = predicted
                plgpu.commit_smem()
                predicted += load(sums_s.at[pl.ds(_LANES // 2, _LANES)], _VECTOR)
            update = full((_LANES,), beta_ref[batch, head], _VECTOR) * (value - predicted)

        def renew(row: Array) -> Array:
            now = decayed(row) + along_rows(key_ref, row) * update
            state_s[row] = now
            return along_rows(query_ref, row) * now

        out_ref[batch, head, columns] = over_rows(renew)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s, new_ref.at[batch, head, :, columns])
        plgpu.wait_smem_to_gmem(0)

    return body


# One number per thread.
_VECTOR = plgpu.Layout.WG_STRIDED((_LANES,), vec_size=1)


def _lane() -> Array:
    if is_simulated():
        return lax.iota(jnp.int32, _LANES)
    return plgpu.broadcasted_iota(jnp.int32, (_LANES,), 0, layout=_VECTOR)
