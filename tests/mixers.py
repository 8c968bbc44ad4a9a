"""Every mixer of attnlab.nn as rows of one table, for the tests that hold for all of them."""

import dataclasses
import functools
from typing import Any

from attnlab import nn

FLASH = {"banded_flash_attention", "banded_flash_gradients"}
# Where sums of every query do not fit into VMEM, or lists of tiles depend on the arrays.
FLASH_IN_TWO = {"banded_flash_attention", "banded_flash_query_gradient", "banded_flash_key_value_gradients"}
LINEAR = {"chunked_linear_attention", "chunked_linear_gradients"}
COVARIANCE = {"banded_covariance", "banded_covariance_gradients"}


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A mixer's class and options.

    is_grid: of images of 5 x 6 positions, and not causal; else of sequences, and causal. needs_grid: it has no causal
      form with these options.
    state_sizes: numbers kept to decode after 3, 13 and 64 tokens, for 16 features; None: it does not decode.
    kernels: those that a training step on a TPU runs; None: another row's.
    """

    mixer: type[nn.Attention]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    is_grid: bool = False
    needs_grid: bool = False
    state_sizes: tuple[int, int, int] | None = None
    kernels: set[str] | None = None

    @property
    def decodes(self) -> bool:
        return self.state_sizes is not None

    def __call__(self, features: int, *, is_causal: bool | None = None, **options: Any) -> nn.Attention:
        is_causal = not self.is_grid if is_causal is None else is_causal
        return self.mixer(features, is_causal=is_causal, **self.options, **options)


MIXERS = {
    "softmax": Mixer(nn.SoftmaxAttention, state_sizes=(96, 416, 2048), kernels=FLASH),
    "grouped": Mixer(nn.SoftmaxAttention, {"num_key_heads": 2, "normalize_qk": True}, state_sizes=(48, 208, 1024)),
    "softmax_sinks": Mixer(
        nn.SoftmaxAttention,
        {"softcap": 2.0, "learned_sinks": True, "num_key_heads": 2},
        state_sizes=(48, 208, 1024),
        kernels=FLASH,
    ),
    "affine_scaled": Mixer(
        nn.AffineScaledAttention, {"num_key_heads": 2, "value_dim": 3, "decay": 0.5}, state_sizes=(52, 192, 906)
    ),
    "local": Mixer(nn.LocalAttention, {"window": 5}, state_sizes=(96, 160, 160), kernels=FLASH),
    "local_sinks": Mixer(nn.LocalAttention, {"window": 4, "sinks": 2, "value_dim": 3}, state_sizes=(84, 168, 168)),
    "local_learned_sinks": Mixer(
        nn.LocalAttention,
        {"window": 4, "sinks": 2, "softcap": 2.0, "learned_sinks": True},
        state_sizes=(96, 192, 192),
    ),
    "local_stride": Mixer(nn.LocalAttention, {"window": 6, "stride": 3, "edge": "clip"}, state_sizes=(96, 192, 192)),
    "local_stride_shift": Mixer(nn.LocalAttention, {"window": 6, "stride": 3}),
    "dilated": Mixer(nn.DilatedAttention, {"window": 3, "dilation": 4}, state_sizes=(96, 384, 384), kernels=FLASH),
    "dilated_stride": Mixer(
        nn.DilatedAttention, {"window": 4, "dilation": 3, "stride": 2, "edge": "clip"}, state_sizes=(96, 384, 384)
    ),
    "block_sparse": Mixer(
        nn.BlockSparseAttention, {"query_block": 2, "key_block": 4, "count": 2}, state_sizes=(144, 576, 2304)
    ),
    "block_sparse_grouped": Mixer(
        nn.BlockSparseAttention,
        {"query_block": 1, "key_block": 2, "count": 3, "num_key_heads": 2, "value_dim": 3},
        state_sizes=(72, 252, 1152),
    ),
    "gate_block": Mixer(
        nn.GateBlockAttention,
        {"query_block": 2, "key_block": 4, "count": 2, "gate_dim": 4, "num_key_heads": 2},
        state_sizes=(72, 288, 1152),
    ),
    "gate_block_per_head": Mixer(
        nn.GateBlockAttention,
        {"query_block": 1, "key_block": 4, "count": 2, "gate_dim": 4, "num_key_heads": 2, "per": "head"},
        state_sizes=(72, 288, 1152),
    ),
    "gate_block_positionless": Mixer(
        nn.GateBlockAttention,
        {"query_block": 4, "key_block": 4, "count": 2, "gate_dim": 3, "rotary": False},
        state_sizes=(140, 560, 2240),
    ),
    "tree_block": Mixer(
        nn.TreeBlockAttention,
        {"query_block": 2, "key_block": 2, "count": 2, "num_key_heads": 2, "value_dim": 3},
        state_sizes=(56, 196, 896),
    ),
    "pyramid": Mixer(
        nn.PyramidAttention,
        {"query_block": 2, "key_block": 4, "sizes": (1, 2), "fractions": (0.5, 1.0), "num_key_heads": 2},
        state_sizes=(104, 416, 1664),
    ),
    "ema_sinks": Mixer(
        nn.EmaSinksAttention,
        {"chunk": 1, "chunks_kept": 4, "decay": 0.5, "num_key_heads": 2},  # divides any part of a sequence
        state_sizes=(48, 64, 64),
    ),
    "dynamic_mask": Mixer(
        nn.DynamicMaskAttention, {"width": 5, "num_key_heads": 2, "value_dim": 3}, state_sizes=(48, 80, 80)
    ),
    "checkpoints": Mixer(
        nn.CheckpointAttention, {"segment": 3, "num_key_heads": 2, "value_dim": 3}, state_sizes=(28, 70, 308)
    ),
    "linear": Mixer(
        nn.LinearAttention, {"feature_map": "elu", "normalize": True}, state_sizes=(80, 80, 80), kernels=LINEAR
    ),
    "taylor": Mixer(
        nn.LinearAttention,
        {"feature_map": "taylor2", "normalize": True, "num_key_heads": 2, "head_dim": 3, "value_dim": 5},
        state_sizes=(240, 240, 240),
    ),
    "retention": Mixer(
        nn.LinearAttention, {"decay": "retention", "rotary": True}, state_sizes=(64, 64, 64), kernels=LINEAR
    ),
    "gated": Mixer(nn.LinearAttention, {"decay": "data"}, state_sizes=(64, 64, 64)),
    "gla": Mixer(
        nn.LinearAttention,
        {"decay": "channel", "output_gate": True, "num_key_heads": 2},
        state_sizes=(64, 64, 64),
        kernels=LINEAR,
    ),
    "delta": Mixer(nn.LinearAttention, {"beta": 1.0, "convolution": 4}, state_sizes=(208, 208, 208)),
    "gated_delta": Mixer(
        nn.LinearAttention,
        {"beta": 2.0, "decay": "data", "convolution": 4, "output_gate": True},
        state_sizes=(208, 208, 208),
        kernels=LINEAR,
    ),
    "kda": Mixer(
        nn.LinearAttention,
        {"beta": 1.0, "decay": "softplus_channel", "convolution": 4, "output_gate": "sigmoid"},
        state_sizes=(208, 208, 208),
    ),
    "delta_product": Mixer(
        nn.LinearAttention,
        {"beta": 2.0, "writes": 3, "decay": "data", "convolution": 3, "num_key_heads": 2},
        state_sizes=(192, 192, 192),
    ),
    "mamba3": Mixer(nn.Mamba3Attention, {"value_dim": 3}, state_sizes=(84, 84, 84)),
    "rwkv7": Mixer(nn.RWKV7Attention, {"num_key_heads": 2}, state_sizes=(64, 64, 64)),
    "log_linear": Mixer(nn.LogLinearAttention, {"levels": 7}, state_sizes=(448, 448, 448)),
    "agent": Mixer(nn.AgentAttention, {"agents": 3}, state_sizes=(104, 104, 104), kernels=LINEAR),
    "agent_grouped": Mixer(
        nn.AgentAttention, {"agents": 4, "num_key_heads": 2, "residual_convolution": 0}, state_sizes=(96, 96, 96)
    ),
    "memory": Mixer(nn.MemoryAttention, {"chunk_size": 4, "head_dim": 8}, state_sizes=(1536, 1536, 1536)),
    "memory_linear": Mixer(
        nn.MemoryAttention,
        {"memory": "linear", "chunk_size": 1, "num_key_heads": 2, "value_dim": 3, "momentum": False},
        state_sizes=(48, 48, 48),
    ),
    "memory_per_chunk": Mixer(
        nn.MemoryAttention,
        {"memory": "swiglu", "objective": "dot", "per": "chunk", "chunk_size": 4, "project": "norm", "hidden": 3},
        state_sizes=(440, 440, 440),
    ),
    "memory_memora": Mixer(nn.MemoraAttention, {"num_key_heads": 2}, state_sizes=(64, 64, 64)),
    "sum": Mixer(
        nn.Sum,
        {
            "mixers": [
                functools.partial(nn.LocalAttention, window=5),
                functools.partial(nn.LinearAttention, feature_map="elu", normalize=True),
            ],
            "gate": True,
        },
        state_sizes=(176, 240, 240),
    ),
    "routing": Mixer(
        nn.RoutingAttention, {"clusters": 3, "window": 4}, state_sizes=(288, 384, 384), kernels=FLASH_IN_TWO
    ),
    "routing_layer": Mixer(
        nn.RoutingAttention,
        {"clusters": 2, "window": 3, "normalize": "layer", "local_heads": 2, "local_window": 5, "value_dim": 3},
        state_sizes=(126, 154, 154),
    ),
    "routing_global": Mixer(nn.RoutingAttention, {"clusters": 3, "window": 4, "membership": "global"}),
    "local_linear": Mixer(
        nn.LocalLinearAttention,
        {"ridge": 3.0, "num_key_heads": 2},
        state_sizes=(48, 208, 1024),
        kernels=FLASH | COVARIANCE | {"covariance_solve"},
    ),
    "local_linear_window": Mixer(
        nn.LocalLinearAttention, {"ridge": 3.0, "window": 5, "value_dim": 3}, state_sizes=(84, 140, 140)
    ),
    "parallax": Mixer(
        nn.ParallaxAttention,
        {"value_dim": 3, "num_key_heads": 2},
        state_sizes=(42, 182, 896),
        kernels={"banded_parallax"} | (COVARIANCE - {"banded_covariance"}),
    ),
    "parallax_window": Mixer(nn.ParallaxAttention, {"window": 5, "normalize_qk": False}, state_sizes=(96, 160, 160)),
    "path": Mixer(nn.PathAttention, state_sizes=(108, 468, 2304)),
    "path_forget": Mixer(
        nn.PathAttention, {"forget": True, "num_key_heads": 2, "value_dim": 3}, state_sizes=(78, 338, 1664)
    ),
    "pointwise": Mixer(nn.PointwiseAttention, state_sizes=(96, 416, 2048)),
    "pointwise_grouped": Mixer(
        nn.PointwiseAttention,
        {"activation": "relu", "divide": False, "num_key_heads": 2, "value_dim": 3},
        state_sizes=(42, 182, 896),
    ),
    "softmax_convolved": Mixer(
        nn.SoftmaxAttention,
        {"convolution": 3, "residual_convolution": 5, "num_key_heads": 2},
        state_sizes=(144, 304, 1120),
    ),
    "block_sparse, grid": Mixer(nn.BlockSparseAttention, {"query_block": 4, "key_block": 3, "count": 3}, is_grid=True),
    "gate_block, grid": Mixer(nn.GateBlockAttention, {"query_block": 4, "key_block": 3, "count": 3}, is_grid=True),
    "tree_block, grid": Mixer(nn.TreeBlockAttention, {"query_block": 4, "key_block": 3, "count": 3}, is_grid=True),
    "connectivity": Mixer(
        nn.ConnectivityAttention,
        {"tokens": 30, "count": 7, "maps": 5, "coefficients": 3, "num_key_heads": 2},
        is_grid=True,
        needs_grid=True,
    ),
    "pointwise, grid": Mixer(nn.PointwiseAttention, {"activation": "relu"}, is_grid=True),
    "pyramid, grid": Mixer(
        nn.PyramidAttention,
        {"query_block": 4, "key_block": 4, "sizes": (1, 4), "fractions": (0.25, 0.75)},
        is_grid=True,
    ),
    "block_hybrid": Mixer(nn.BlockHybrid, {"block": 6}, is_grid=True, needs_grid=True),
    "regions": Mixer(
        nn.RegionAttention, {"regions": (5, 2), "count": 3, "num_key_heads": 2}, is_grid=True, needs_grid=True
    ),
    "softmax, grid": Mixer(nn.SoftmaxAttention, is_grid=True),
    "local, grid": Mixer(nn.LocalAttention, {"window": (3, 9)}, is_grid=True, needs_grid=True),
    "dilated, grid": Mixer(nn.DilatedAttention, {"window": 3, "dilation": (1, 2)}, is_grid=True, needs_grid=True),
    "linear, grid": Mixer(nn.LinearAttention, {"feature_map": "relu", "normalize": True}, is_grid=True),
    "l2vit": Mixer(
        nn.LinearAttention,
        {"feature_map": "relu", "normalizer_floor": 0.5, "residual_convolution": (3, 5)},
        is_grid=True,
        needs_grid=True,
    ),
    "axial": Mixer(nn.AxialAttention, {"axis": 1}, is_grid=True, needs_grid=True),
    "agent, grid": Mixer(nn.AgentAttention, {"agents": (2, 3), "bias_grid": (5, 6)}, is_grid=True, needs_grid=True),
    "agent_learned": Mixer(nn.AgentAttention, {"agents": 4, "num_key_heads": 2}, is_grid=True),
    "landmark": Mixer(nn.LandmarkAttention, {"landmarks": (2, 3)}, is_grid=True, needs_grid=True),
    "landmark_softmax": Mixer(
        nn.LandmarkAttention,
        {
            "landmarks": (2, 2),
            "kernel": "softmax",
            "inverse": "exact",
            "ridge": 0.1,
            "symmetric": True,
            "num_key_heads": 2,
            "value_dim": 3,
        },
        is_grid=True,
        needs_grid=True,
    ),
    "inline": Mixer(nn.InlineAttention, is_grid=True, needs_grid=True),
    "routing, grid": Mixer(
        nn.RoutingAttention, {"clusters": 3, "window": 10, "membership": "global", "num_key_heads": 2}, is_grid=True
    ),
}
DECODING = [name for name, mixer in MIXERS.items() if mixer.decodes]
