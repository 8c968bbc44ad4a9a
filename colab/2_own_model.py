# %% [markdown]
# # 2. One primitive in your own model
#
# A sliding window in plain JAX, in Flax NNX and Linen, and in Equinox: one function, whose arrays are
# `[batch, length, heads, head_dim]`. You train a one-layer model that has to look six tokens back, and look at what it
# attends to. It takes about a minute on two CPU cores.

# %%
# %pip install -q equinox
import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx

import attnlab
from attnlab import masks
from attnlab.nn import attention_fn

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

# %% [markdown]
# ## In the place of another call
#
# `jax.nn.dot_product_attention` has the same layout, so a call can be exchanged. Its `local_window_size=(6, 0)` says
# how many keys lie before and after the query; `window=7` counts the query too.

# %%
B, T, N, H = 2, 48, 4, 16
query, key, value = jax.random.normal(jax.random.key(0), (3, B, T, N, H))

ours = attnlab.local_attention(query, key, value, window=7, is_causal=True)
theirs = jax.nn.dot_product_attention(query, key, value, is_causal=True, local_window_size=(6, 0))
print("largest difference to jax.nn:", float(jnp.abs(ours - theirs).max()))

visible = masks.dense_mask(masks.neighborhood((T,), window=7, is_causal=True), (T,))
dense = attnlab.dot_product_attention(query, key, value, mask=visible[None, None])
print("largest difference to dense attention under the mask:", float(jnp.abs(ours - dense).max()))

# %% [markdown]
# ## Plain JAX
#
# The task: predict the token six positions earlier. A window of 7 reaches it; a window of 6 falls one short.

# %%
VOCABULARY, LENGTH, BACK, WIDTH = 16, 48, 6, 32


def initialize(key):
    keys = jax.random.split(key, 6)
    table = lambda key, *shape: jax.random.normal(key, shape) * shape[0] ** -0.5
    return {
        "tokens": table(keys[0], VOCABULARY, WIDTH),
        "positions": table(keys[1], LENGTH, WIDTH),
        "query": table(keys[2], WIDTH, 1, WIDTH),
        "key": table(keys[3], WIDTH, 1, WIDTH),
        "value": table(keys[4], WIDTH, 1, WIDTH),
        "output": table(keys[5], WIDTH, VOCABULARY),
    }


def project(parameters, tokens):
    x = parameters["tokens"][tokens] + parameters["positions"]
    return (jnp.einsum("BTD,DNH->BTNH", x, parameters[name]) for name in ("query", "key", "value"))


def logits(parameters, tokens, window):
    query, key, value = project(parameters, tokens)
    mixed = attnlab.local_attention(query, key, value, window=window, is_causal=True)
    return mixed[:, :, 0] @ parameters["output"]


def loss(parameters, tokens, window):
    scores = logits(parameters, tokens, window)[:, BACK:]
    return optax.losses.softmax_cross_entropy_with_integer_labels(scores, tokens[:, :-BACK]).mean()


# %% quick="STEPS = 5"
STEPS = 100


# %%
def train(window):
    parameters = initialize(jax.random.key(0))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(carry, key):
        parameters, state = carry
        tokens = jax.random.randint(key, (64, LENGTH), 0, VOCABULARY)
        value, gradient = jax.value_and_grad(loss)(parameters, tokens, window)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state), value

    keys = jax.random.split(jax.random.key(1), STEPS)
    (parameters, _), losses = jax.lax.scan(step, (parameters, optimizer.init(parameters)), keys)
    return parameters, losses


trained = {window: train(window) for window in (7, 6)}
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for window, (_, losses) in trained.items():
    axis.plot(losses, label=f"window {window}")
axis.axhline(jnp.log(VOCABULARY), color="grey", linewidth=0.8, label="guessing")
axis.set(xlabel="step", ylabel="loss (nats)", title="Six positions back needs a window of seven")
axis.legend()
plt.show()

# %% [markdown]
# ## What it attends to
#
# Attention weights are what comes out when every key carries its own one-hot vector as its value (notebook 1). With a
# window of 7 the weight lies six positions back; with 6 there is nothing to find.


# %%
def attention_weights(parameters, tokens, window):
    query, key, _ = project(parameters, tokens)
    one_hot = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None], (len(tokens), LENGTH, 1, LENGTH))
    return attnlab.local_attention(query, key, one_hot, window=window, is_causal=True)[:, :, 0]


tokens = jax.random.randint(jax.random.key(2), (64, LENGTH), 0, VOCABULARY)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for axis, (window, (parameters, _)) in zip(axes, trained.items()):
    mean = attention_weights(parameters, tokens, window).mean(axis=0)
    image = axis.imshow(mean, cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
    axis.set(title=f"window {window}", xlabel="key", ylabel="query")
figure.colorbar(image, ax=axes, label="mean attention weight", shrink=0.8)
plt.show()

# %% [markdown]
# ## Decode
#
# `local_step` takes one token at a time and keeps only a window of keys and values, however long the sequence. Its
# outputs are those of the whole call.

# %%
query, key, value = project(trained[7][0], tokens)


def decode(cache, token):
    out, cache = attnlab.local_step(cache, *token, window=7)
    return cache, out


by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], (query, key, value))
cache = attnlab.init_local_cache(len(tokens), 1, WIDTH, window=7)
cache, outs = jax.lax.scan(decode, cache, by_token)
at_once = attnlab.local_attention(query, key, value, window=7, is_causal=True)
print("largest difference:", float(jnp.abs(jnp.moveaxis(outs[:, :, 0], 0, 1) - at_once).max()))
print("kept per sequence:", sum(leaf[0].size for leaf in jax.tree.leaves(cache) if leaf.ndim > 1), "numbers")

# %% [markdown]
# ## Flax NNX
#
# Flax's own layer takes an attention function. `attnlab.nn.attention_fn` makes one of a primitive; masks, biases and
# `is_causal=True` of the layer are passed on where the primitive has them, and what it cannot do is refused.

# %%
x = jax.random.normal(jax.random.key(3), (B, T, 32))
window = attention_fn(attnlab.local_attention, window=7, is_causal=True)

nnx_layer = nnx.MultiHeadAttention(4, 32, attention_fn=window, decode=False, rngs=nnx.Rngs(0))
print(nnx_layer(x).shape)

padding = nnx.make_attention_mask(jnp.ones((B, T)), jnp.ones((B, T)))
try:
    nnx_layer(x, mask=padding)
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# ## Flax Linen
#
# The same function serves Linen's layer.

# %%
linen_layer = flax.linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=window)
variables = linen_layer.init(jax.random.key(4), x)
print(linen_layer.apply(variables, x).shape)

# %% [markdown]
# ## Equinox
#
# Equinox's `MultiheadAttention` has no such argument, so the layer is written out; it is short. Equinox treats one
# sequence and leaves the batch to `jax.vmap`, so the primitive gets a batch of one.


# %%
class LocalSelfAttention(eqx.Module):
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    heads: int = eqx.field(static=True)
    window: int = eqx.field(static=True)

    def __init__(self, features, heads, window, key):
        linear = [eqx.nn.Linear(features, features, key=each) for each in jax.random.split(key, 4)]
        self.query, self.key, self.value, self.output = linear
        self.heads, self.window = heads, window

    def __call__(self, x):  # [length, features]
        q, k, v = (jax.vmap(each)(x) for each in (self.query, self.key, self.value))
        q, k, v = (each.reshape(1, len(x), self.heads, -1) for each in (q, k, v))
        out = attnlab.local_attention(q, k, v, window=self.window, is_causal=True)
        return jax.vmap(self.output)(out.reshape(len(x), -1))


eqx_layer = LocalSelfAttention(32, heads=4, window=7, key=jax.random.key(5))
print(jax.vmap(eqx_layer)(x).shape)

# %% [markdown]
# ## The same window in each
#
# Which inputs does an output depend on? The gradient says so: each picture has the size of the derivative of output
# `t` by input `s`, for layers with weights of their own.


# %%
def dependence(layer):
    """[T, T]: size of the derivative of each output by each input."""
    derivative = jax.jacobian(lambda x: layer(x[None])[0].sum(axis=-1))(x[0])
    return jnp.abs(derivative).sum(axis=-1)


layers = {
    "Flax NNX": nnx_layer,
    "Flax Linen": lambda x: linen_layer.apply(variables, x),
    "Equinox": jax.vmap(eqx_layer),
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
for axis, (name, layer) in zip(axes, layers.items()):
    axis.imshow(dependence(layer), cmap="Blues", interpolation="nearest")
    axis.set(title=name, xlabel="input", ylabel="output")

# %% [markdown]
# ## On a GPU or TPU
#
# The code stays as it is: a call picks its form when the program is compiled. bfloat16 inputs are what kernels are made
# for; on a CPU they gain nothing. `explain` says what would run.

# %%
halves = [each.astype(jnp.bfloat16) for each in (query, key, value)]
print(*attnlab.explain(attnlab.local_attention, *halves, window=7, is_causal=True), sep="\n")

# %% [markdown]
# Next: `3_ablation.ipynb` compares mechanisms in one model under equal conditions.
