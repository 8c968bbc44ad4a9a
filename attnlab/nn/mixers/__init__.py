"""Mixers: what moves information between places, one module a family; `base` has what they share."""

from attnlab.nn.mixers.agent import AgentAttention
from attnlab.nn.mixers.axial import AxialAttention
from attnlab.nn.mixers.base import Attention, MixerCache, MixerFactory
from attnlab.nn.mixers.linear import InlineAttention, LinearAttention
from attnlab.nn.mixers.local import DilatedAttention, LocalAttention
from attnlab.nn.mixers.local_linear import LocalLinearAttention, ParallaxAttention
from attnlab.nn.mixers.routing import RoutingAttention
from attnlab.nn.mixers.softmax import SoftmaxAttention

__all__ = [
    "AgentAttention",
    "Attention",
    "AxialAttention",
    "DilatedAttention",
    "InlineAttention",
    "LinearAttention",
    "LocalAttention",
    "LocalLinearAttention",
    "MixerCache",
    "MixerFactory",
    "ParallaxAttention",
    "RoutingAttention",
    "SoftmaxAttention",
]
