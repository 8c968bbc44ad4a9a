"""Flax NNX layers. Parameters have no value until `initialize` draws them by path."""

from attnlab.nn.parameters import bind, count_parameters, initialize, parameter, parameter_shapes

__all__ = ["bind", "count_parameters", "initialize", "parameter", "parameter_shapes"]
