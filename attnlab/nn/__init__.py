"""Flax NNX layers. Parameters have no value until `initialize` draws them by path."""

from attnlab.nn.layers import GatedMLP, Linear, RMSNorm, dropout, rotary_embedding
from attnlab.nn.mixers import (
    AgentAttention,
    Attention,
    AxialAttention,
    DilatedAttention,
    InlineAttention,
    LinearAttention,
    LocalAttention,
    MixerCache,
    MixerFactory,
    SoftmaxAttention,
)
from attnlab.nn.parameters import Parameters, bind, count_parameters, initialize, parameter, parameter_shapes

__all__ = [
    "AgentAttention",
    "Attention",
    "AxialAttention",
    "DilatedAttention",
    "GatedMLP",
    "InlineAttention",
    "Linear",
    "LinearAttention",
    "LocalAttention",
    "MixerCache",
    "MixerFactory",
    "Parameters",
    "RMSNorm",
    "SoftmaxAttention",
    "bind",
    "count_parameters",
    "dropout",
    "initialize",
    "parameter",
    "parameter_shapes",
    "rotary_embedding",
]
