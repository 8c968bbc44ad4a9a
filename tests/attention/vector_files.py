"""Vectors of attention with (out, lse), and their gradients: what tests of several modules compare by one loss."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

VECTORS = Path(__file__).parents[1] / "vectors" / "block_sparse"


def vectors(name):
    return {key: x if x.ndim else x.item() for key, x in np.load(VECTORS / f"{name}.npz").items()}


def assert_attention(attend, data):
    """attend: arrays by name -> (out, lse), in float64. Of which arrays there are gradients, the data says."""
    given = {name.removeprefix("grad_"): data[name.removeprefix("grad_")] for name in data if name.startswith("grad_")}
    finite = np.isfinite(data["lse"])

    def loss(given):
        out, lse = attend(given)
        shown = jnp.where(finite, lse * data["cotangent_lse"], 0)
        return (out * data["cotangent_out"]).sum() + shown.sum(), (out, lse)

    with jax.enable_x64(True):
        gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(given)
        np.testing.assert_allclose(out, data["out"], atol=1e-12)
        np.testing.assert_allclose(lse, data["lse"], atol=1e-12)
        for argument, gradient in gradients.items():
            np.testing.assert_allclose(gradient, data[f"grad_{argument}"], atol=1e-11, err_msg=argument)
