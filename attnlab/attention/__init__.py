"""Attention primitives: pure functions, one module a mechanism. Needs jax and einops alone."""

from attnlab.attention._dispatch import Choice, explain

__all__ = ["Choice", "explain"]
