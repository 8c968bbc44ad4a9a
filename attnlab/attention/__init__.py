"""Attention primitives: pure functions, one mechanism per module. Needs jax and einops alone.

A module reads from top to bottom: the formula, the call, the reference form, the fast form, the step. Below the
mechanisms: _kernels (the kernels of kernels_pallas as implementations), _shared (what several mechanisms are made of),
_dispatch (which implementation serves a call, and on which devices), masks (who sees whom).
"""

from attnlab.attention._public import *  # noqa: F403
