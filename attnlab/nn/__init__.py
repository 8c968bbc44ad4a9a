"""Flax NNX layers. Parameters have no value until `initialize` draws them by path."""

from attnlab.nn.adapters import attention_fn
from attnlab.nn.choices import additive_logits, head_gates, straight_through_choice
from attnlab.nn.layers import GatedMLP, Linear, RMSNorm, dropout, rotary_embedding
from attnlab.nn.mixers.affine_scaled import AffineScaledAttention
from attnlab.nn.mixers.agent import AgentAttention
from attnlab.nn.mixers.axial import AxialAttention
from attnlab.nn.mixers.base import Attention, MixerCache, MixerFactory, Pattern
from attnlab.nn.mixers.block_sparse import BlockSparseAttention, RegionAttention
from attnlab.nn.mixers.blockwise import BlockHybrid, CheckpointAttention
from attnlab.nn.mixers.dynamic_mask import DynamicMaskAttention
from attnlab.nn.mixers.ema_sinks import EmaSinksAttention
from attnlab.nn.mixers.landmark import LandmarkAttention
from attnlab.nn.mixers.learned_blocks import ConnectivityAttention, GateBlockAttention, TreeBlockAttention
from attnlab.nn.mixers.linear import InlineAttention, LinearAttention
from attnlab.nn.mixers.local import DilatedAttention, LocalAttention
from attnlab.nn.mixers.local_linear import LocalLinearAttention, ParallaxAttention
from attnlab.nn.mixers.log_linear import LogLinearAttention
from attnlab.nn.mixers.mamba3 import Mamba3Attention
from attnlab.nn.mixers.memora import MemoraAttention
from attnlab.nn.mixers.memory import MemoryAttention
from attnlab.nn.mixers.path import PathAttention
from attnlab.nn.mixers.pointwise import PointwiseAttention
from attnlab.nn.mixers.pyramid import PyramidAttention
from attnlab.nn.mixers.routing import RoutingAttention
from attnlab.nn.mixers.rwkv7 import RWKV7Attention
from attnlab.nn.mixers.softmax import SoftmaxAttention
from attnlab.nn.mixers.sum import Sum
from attnlab.nn.parameters import (
    AuxiliaryLoss,
    Buffer,
    Parameters,
    auxiliary_loss,
    bind,
    buffer,
    count_parameters,
    initialize,
    learned,
    merge,
    parameter,
    parameter_shapes,
    split,
)
