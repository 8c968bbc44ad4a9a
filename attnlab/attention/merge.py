"""Attention over a union of disjoint sets of keys, from attention over each of them.

    lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

Exact: a softmax over the union splits into the parts' softmaxes, weighted by their shares of the denominator.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnlab.attention._shared.checks import accumulator_dtype, check_array, require, shape_text
from attnlab.attention._shared.softmax import softmax_parts

Array = jax.Array


def merge_attention(outputs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Merges attention outputs computed over disjoint keys, as if computed over all of them at once.

    Args:
      outputs: [B, *T, N, V] each, equal shapes.
      lses: [B, *T, N] each, the log of each part's softmax denominator (return_lse=True). A part in which a query sees
        no key has lse -inf there and does not count; if no part sees any, the result is 0 with lse -inf.

    Returns:
      out [B, *T, N, V] in the dtype of outputs[0]; lse [B, *T, N] in float32 (float64 for float64). Differentiable in
      the outputs and in the lses, also where they are -inf.
    """
    for name, parts in (("outputs", outputs), ("lses", lses)):
        if not isinstance(parts, (tuple, list)):
            raise TypeError(f"{name}: got {type(parts).__name__}; need a list of arrays")
    require(len(outputs) > 0, "outputs", "no parts", "need at least one")
    require(len(lses) == len(outputs), "lses", f"{len(lses)} parts", f"need one for each of {len(outputs)} outputs")
    like = getattr(outputs[0], "shape", ())
    for index, (out, lse) in enumerate(zip(outputs, lses, strict=True)):
        check_array(
            f"outputs[{index}]",
            out,
            like,
            "[batch, *space, heads, head_dim], equal for all parts",
        )
        check_array(f"lses[{index}]", lse, out.shape[:-1], f"[batch, *space, heads] of output {shape_text(out)}")
    dtype = accumulator_dtype(*outputs, *lses)
    shares, total, lse = softmax_parts(jnp.stack(lses, axis=-1).astype(dtype))
    merged = jnp.einsum("...p,p...v->...v", shares / total, jnp.stack(outputs).astype(dtype))
    return merged.astype(outputs[0].dtype), lse
