# %% [markdown]
# # 5. A mechanism of your own
#
# You write sigmoid attention ([Ramapuram et al. 2024](https://arxiv.org/abs/2409.04431)): each weight is a sigmoid of
# its own logit, so that no query divides by a sum. First the formula, then a form without a large matrix, a layer, an
# ablation, tests, and a first Pallas kernel. It takes about two minutes on two CPU cores.

# %%
# %pip install -q pytest
import functools
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental import pallas as pl

from attnlab import masks, models, nn

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

# %% [markdown]
# ## The reference mirrors the formula
#
# `out_t = Σ_s sigmoid(q_t · k_s / √H - log n_t) v_s` over the keys that query `t` sees; `n_t` is their number. The
# paper takes the length of the sequence for `n`; with the number of keys seen, a causal output does not depend on how
# long the sequence goes on. Arrays are `[B, T, N, H]`: batch, length, heads, head dim.
#
# The cell writes a module, as tests and configs will import it.

# %% writes="sigmoid.py"
"""Sigmoid attention (Ramapuram et al. 2024): out_t = sum_s sigmoid(q_t . k_s / sqrt(H) - log n_t) v_s."""

import functools

import jax
import jax.numpy as jnp

from attnlab import nn


def weights_of(query, key, seen, count):
    """[B, N, T, S]. seen: bool, broadcast to it, whether a query sees a key. count: [T, 1], keys that it sees."""
    logits = query.shape[-1] ** -0.5 * jnp.einsum("BTNH,BSNH->BNTS", query, key)
    return jnp.where(seen, jax.nn.sigmoid(logits - jnp.log(count)), 0)


def reference(query, key, value, *, is_causal=False):
    queries, keys = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])
    seen = keys <= queries if is_causal else jnp.ones_like(keys, bool)
    count = queries + 1 if is_causal else jnp.full_like(queries, len(keys))
    return jnp.einsum("BNTS,BSNV->BTNV", weights_of(query, key, seen, count), value)


# %%
import sigmoid

T, H = 24, 16
query, key, value = jax.random.normal(jax.random.key(0), (3, 2, T, 2, H))
unit = jnp.broadcast_to(jnp.eye(T)[None, :, None], (2, T, 2, T))
figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for axis, is_causal in zip(axes, (False, True)):
    weights = sigmoid.reference(query, key, unit, is_causal=is_causal)[0, :, 0]
    image = axis.imshow(weights, cmap="Blues", vmin=0, interpolation="nearest")
    axis.set(title="causal" if is_causal else "every key", xlabel="key", ylabel="query")
    figure.colorbar(image, ax=axis, shrink=0.8)

# %% [markdown]
# ## A form without the large matrix
#
# The reference holds `T x S` weights per head. Nothing here is divided by a sum over all keys, so blocks of keys can
# simply be added up, one after the other. `jax.checkpoint` computes a block's weights again in the gradient, in place
# of keeping them.

# %% writes="-a sigmoid.py"


@functools.partial(jax.jit, static_argnames=("is_causal", "block"))
def blocked(query, key, value, *, is_causal=False, block=64):
    """reference, with weights of `block` keys at once."""
    (batch, length, heads, _), keys = query.shape, key.shape[1]
    queries = jnp.arange(length)[:, None]
    count = queries + 1 if is_causal else jnp.full_like(queries, keys)

    def split(x):
        """[B, S, N, H] -> [blocks, B, block, N, H], padded at the end."""
        x = jnp.pad(x, ((0, 0), (0, -keys % block), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(total, part):
        first, key, value = part
        index = first + jnp.arange(block)
        seen = (index < keys) & (index <= queries) if is_causal else index < keys
        return total + jnp.einsum("BNTS,BSNV->BTNV", weights_of(query, key, seen, count), value), None

    empty = jnp.zeros((batch, length, heads, value.shape[-1]), query.dtype)
    firsts = jnp.arange(0, keys, block)
    return jax.lax.scan(add, empty, (firsts, split(key), split(value)))[0]


# %%
sigmoid = importlib.reload(sigmoid)


def memory(form, length):
    """MB beside the arguments that the gradient takes."""
    shape = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
    gradient = jax.grad(lambda *heads: form(*heads, is_causal=True).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes / 1e6


lengths = [512, 1024, 2048, 4096]
figure, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for form in (sigmoid.reference, sigmoid.blocked):
    axis.loglog(lengths, [memory(form, length) for length in lengths], "o-", label=form.__name__)
axis.set(xlabel="length", ylabel="MB for a gradient", xticks=lengths, xticklabels=lengths)
axis.minorticks_off()
axis.legend()
plt.show()

# %% [markdown]
# ## A layer
#
# A mixer is a subclass of `nn.Attention`, which has the projections, rotary positions and the rest. It needs two
# methods: `mix`, between the heads, and `mechanism_flops`. (With a cache and a step it would decode too; without, it
# trains, is compared, and says that it does not decode.)

# %% writes="-a sigmoid.py"


class SigmoidAttention(nn.Attention):
    """Every position sees every other (or every earlier one), by sigmoids."""

    segments_refusal = "does not keep packed documents apart"

    def mix(self, query, key, value, x, segment_ids):
        group = self.num_heads // self.num_key_heads
        key, value = (jnp.repeat(heads, group, axis=2) for heads in (key, value))
        return blocked(query, key, value, is_causal=self.is_causal)

    def mechanism_flops(self, space):
        (length,) = space
        return self.pair_flops(length * (length + 1) // 2 if self.is_causal else length * length)


# %%
sigmoid = importlib.reload(sigmoid)
model = models.LanguageModel(vocabulary=256, features=64, depth=2, mixers=[sigmoid.SigmoidAttention])
print(f"{nn.count_parameters(model):,} parameters, {model.flops(128) / 128:,.0f} operations per token of 128")
bound = nn.bind(model, nn.initialize(model, jax.random.key(0)))
print(bound(jnp.zeros((1, 10), jnp.int32)).shape, "|", bound.decoding_refusal)

# %% [markdown]
# ## Tests
#
# What a mechanism should promise: both forms agree, in values and gradients, at lengths that blocks do not divide; and
# no causal output depends on a later token. Break `blocked` above (`index <= queries + 1`, say) and see them fail.

# %% writes="test_sigmoid.py"
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sigmoid


def heads(length=37):
    return jax.random.normal(jax.random.key(0), (3, 2, length, 2, 8))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_blocks_equal_the_reference(is_causal, block):
    def gradients(form, **options):
        return jax.grad(lambda heads: jnp.sum(jnp.sin(form(*heads, is_causal=is_causal, **options))))(heads())

    expected = sigmoid.reference(*heads(), is_causal=is_causal)
    np.testing.assert_allclose(sigmoid.blocked(*heads(), is_causal=is_causal, block=block), expected, atol=1e-5)
    np.testing.assert_allclose(
        gradients(sigmoid.blocked, block=block), gradients(sigmoid.reference), rtol=1e-4, atol=1e-5
    )


def test_no_output_depends_on_a_later_token():
    changed = heads().at[:, :, 20:].set(7.0)
    before, after = (sigmoid.blocked(*each, is_causal=True) for each in (heads(), changed))
    np.testing.assert_array_equal(before[:, :20], after[:, :20])


# %%
# !python -m pytest -q -p no:cacheprovider test_sigmoid.py

# %% [markdown]
# ## In an ablation
#
# A config names your class; the module is found beside it. Two seeds and sixty steps, to see that it learns. Three
# seeds give intervals (notebook 3).

# %% writes="sigmoid.gin"
# # Sigmoid attention (Ramapuram et al. 2024).
# from __gin__ import dynamic_registration
# import sigmoid
#
# MIXERS = [@sigmoid.SigmoidAttention]

# %% writes="compare.gin" quick="STEPS = 21\nablate.Ablation.seeds = [0]"
# from __gin__ import dynamic_registration
# from attnlab import ablate
#
# include 'experiments/lm/quickstart.gin'
#
# ablate.Ablation.question = 'Does attention need a softmax?'
# ablate.Ablation.baseline = 'softmax'
# ablate.Ablation.seeds = [0, 1]
# ablate.Ablation.arms = {'softmax': 'experiments/mixers/softmax.gin', 'sigmoid': 'sigmoid.gin'}
# STEPS = 60

# %%
# !attnlab ablate compare.gin 2>&1 | grep --line-buffered -o '^\[.*\] [^,]*\|^attnlab: .*'

# %%
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for row in map(json.loads, Path("runs/ablate/compare/results.jsonl").read_text().splitlines()):
    curve = [(each["step"], each["loss"]) for each in row["history"] if each["split"] == "train"]
    color = {"softmax": "tab:blue", "sigmoid": "tab:orange"}[row["arm"]]
    axis.plot(*zip(*curve), color=color, label=row["arm"] if row["seed"] == 0 else None)
axis.set(xlabel="step", ylabel="training loss (nats per byte)")
axis.legend()
plt.show()

# %% [markdown]
# ## A kernel: what one program does
#
# A Pallas kernel is a function of references to blocks of memory. The grid here has a program for each head and each
# tile of queries. A program reads its tile of queries, goes over tiles of keys, and writes its tile of outputs. A
# causal query tile has nothing to see in later key tiles, so the loop ends before them: of the tiles below, the white
# ones are never read. Only the light ones need a mask; this first kernel masks all that it reads.

# %%
TILE, LENGTH = 128, 1024
tiles = masks.block_map(masks.causal(), (LENGTH,), (TILE,), (TILE,))
figure, axis = plt.subplots(figsize=(3.4, 3.2), layout="constrained")
axis.imshow(tiles.visited.astype(int) + tiles.full, cmap="Blues", vmin=0, vmax=2)
axis.set(xlabel="tile of keys", ylabel="tile of queries")
axis.set_title(f"{tiles.visited.sum()} of {tiles.visited.size} visited")
plt.show()

# %% [markdown]
# ## A kernel: the code
#
# In interpret mode a kernel runs on a CPU, slowly and with the same numbers. So it can be written and tested without
# the accelerator. Its gradient is that of the blocked form, until it has a kernel too (`jax.custom_vjp`).


# %%
def causal_kernel(query_ref, key_ref, value_ref, out_ref):
    """query_ref, out_ref: [TILE, H], of one head. key_ref, value_ref: [T, H], of the same head."""
    tile = pl.program_id(1)
    query = query_ref[...].astype(jnp.float32) * query_ref.shape[-1] ** -0.5
    position = tile * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), 0)
    bias = jnp.log((position + 1).astype(jnp.float32))

    def add(number, total):
        rows = pl.ds(number * TILE, TILE)
        logits = jnp.dot(query, key_ref[rows, :].astype(jnp.float32).T, preferred_element_type=jnp.float32)
        index = number * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), 1)
        weights = jnp.where(index <= position, jax.nn.sigmoid(logits - bias), 0.0)
        return total + jnp.dot(weights, value_ref[rows, :].astype(jnp.float32), preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, tile + 1, add, jnp.zeros(out_ref.shape, jnp.float32))
    out_ref[...] = total.astype(out_ref.dtype)


@jax.custom_vjp
def causal_sigmoid(query, key, value):
    """[B, T, N, H] with T a multiple of TILE."""
    batch, length, heads, width = query.shape
    flat = [jnp.moveaxis(x, 2, 1).reshape(batch * heads, length, -1) for x in (query, key, value)]
    a_tile = pl.BlockSpec((None, TILE, width), lambda head, tile: (head, tile, 0))
    a_head = pl.BlockSpec((None, length, width), lambda head, tile: (head, 0, 0))
    out = pl.pallas_call(
        causal_kernel,
        grid=(batch * heads, length // TILE),
        in_specs=[a_tile, a_head, a_head],
        out_specs=a_tile,
        out_shape=jax.ShapeDtypeStruct(flat[0].shape, query.dtype),
        interpret=jax.default_backend() != "tpu",
    )(*flat)
    return jnp.moveaxis(out.reshape(batch, heads, length, -1), 1, 2)


def forward(*heads):
    return causal_sigmoid(*heads), heads


def backward(heads, gradient):
    return jax.vjp(functools.partial(sigmoid.blocked, is_causal=True), *heads)[1](gradient)


causal_sigmoid.defvjp(forward, backward)

heads = jax.random.normal(jax.random.key(1), (3, 1, 4 * TILE, 2, 64))
expected = sigmoid.reference(*heads, is_causal=True)
print("largest difference to the reference:", float(jnp.abs(causal_sigmoid(*heads) - expected).max()))


def gradient(form, **options):
    return jax.grad(lambda heads: jnp.sum(form(*heads, **options) ** 2))(heads)


got, wanted = gradient(causal_sigmoid), gradient(sigmoid.reference, is_causal=True)
print("of the gradients:", float(jnp.abs(got - wanted).max()), "beside numbers up to", float(jnp.abs(wanted).max()))
np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)

# %% [markdown]
# A head's keys and values have to fit into a TPU core's fast memory here; attnlab's kernels
# ([kernels_pallas](REPOSITORY/tree/main/kernels_pallas)) bring them in tile by tile.
#
# ## Into the library
#
# [CONTRIBUTING.md](REPOSITORY/blob/main/CONTRIBUTING.md) names the nine files of a new mechanism, in order: with a row
# in `attnlab/catalog.py` the suites for values, gradients, causality, meshes, memory and NaN, and the benchmark, go
# over it.
#
# ## On a GPU or TPU
#
# All but the kernel runs there as it is. On a TPU the kernel is compiled, as `interpret` is False there (it compiles
# for a v5e; it has not been run on one). On a GPU it stays interpreted: kernels for GPUs are written otherwise, as
# those in [kernels_pallas/gpu](REPOSITORY/tree/main/kernels_pallas/gpu).
#
# Next: `6_devices.ipynb` shares work among devices.
