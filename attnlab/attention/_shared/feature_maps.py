"""Feature maps of linear attention: what stands for exp in exp(q.k) = phi(q).phi(k)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention._shared.checks import Array, require

FeatureMap = Callable[[Array], Array] | str | None


def elu(x: Array) -> Array:
    """elu(x) + 1, positive however small x: 1 + expm1(x) would round to 0 (Katharopoulos et al. 2020)."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def taylor2(x: Array) -> Array:
    """[..., H] -> [..., 1 + H + H(H+1)/2] with taylor2(x).taylor2(y) = 1 + x.y + (x.y)^2 / 2 (Arora et al. 2024)."""
    row, column = jnp.triu_indices(x.shape[-1])
    weight = jnp.where(row == column, 0.5**0.5, 1).astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    pairs = x[..., row] * x[..., column] * weight
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs], axis=-1)


_BY_NAME: dict[str, Callable[[Array], Array]] = {"elu": elu, "relu": jax.nn.relu, "taylor2": taylor2}


def _function(feature_map: FeatureMap) -> Callable[[Array], Array]:
    if feature_map is None:
        return lambda x: x
    if isinstance(feature_map, str):
        require(
            feature_map in _BY_NAME, "feature_map", repr(feature_map), f"need a function or one of {list(_BY_NAME)}"
        )
        return _BY_NAME[feature_map]
    require(callable(feature_map), "feature_map", repr(feature_map), "need None, a name or a function")
    return feature_map


def feature_width(feature_map: FeatureMap, head_dim: int) -> int:
    """Width F of the mapped heads; raises ValueError for what is no feature map."""
    mapped = jax.eval_shape(_function(feature_map), jax.ShapeDtypeStruct((1, head_dim), jnp.float32))
    require(mapped.shape[:-1] == (1,), "feature_map", f"[1,{head_dim}] -> {mapped.shape}", "need [..., H] -> [..., F]")
    return mapped.shape[-1]


def apply_feature_map(
    feature_map: FeatureMap, query: Array, key: Array, scale: float | Array, dtype: Any
) -> tuple[Array, Array]:
    """Mapped query, scale included, and mapped key, both in `dtype`.

    The scale multiplies the mapped query; with "taylor2", whose weight is that of the scaled logit, the query itself.
    """
    function = _function(feature_map)
    query, key = query.astype(dtype), key.astype(dtype)
    query = function(query * scale) if feature_map == "taylor2" else function(query) * scale
    return query, function(key)


def normalizer_epsilon(feature_map: FeatureMap) -> float:
    """What published code adds to the sum of weights before it divides."""
    return 1e-6 if feature_map == "taylor2" else 1e-10
