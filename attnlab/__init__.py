"""Attention mechanisms in JAX, each in forms that agree, and controlled ablations of them.

The primitives are attributes of this package and need jax and einops alone. The layers, models, data, training and
ablations (attnlab.nn, .models, .data, .train, .ablate) need the extra "experiments".
"""

from attnlab.attention._public import *  # noqa: F403
