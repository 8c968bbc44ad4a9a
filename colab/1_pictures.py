# %% [markdown]
# # 1. The mechanisms in pictures
#
# Every mechanism of attnlab makes the output of a query out of values, and is linear in them: `out_t = Σ_s w_ts v_s`.
# A mechanism is the way in which it finds the weights `w_ts`. Here you look at these weights, mechanism by mechanism.
# It takes a minute on two CPU cores.
#
# All calls below ask for `implementation="reference"`, the form that mirrors the paper's formula. The last section
# compares it with the fast form.

# %%
import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import attnlab
from attnlab import catalog, masks

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

# %% [markdown]
# ## How to see weights
#
# Give key `s` the `s`-th unit vector as its value. Then the output of a query *is* its row of weights. This works for
# any mechanism, and needs no code inside it.
#
# Arrays are `[batch, length, heads, head_dim]`; images have two axes in the place of `length`. Below there is one
# batch entry and one head.


# %%
def weights(attend, query, key, **options):
    """[T, S]: what each query takes of each value."""
    positions = math.prod(key.shape[1:-2])
    unit = jnp.eye(positions).reshape(*key.shape[:-1], positions)
    out = attend(query, key, unit, implementation="reference", **options)
    out = out[0] if isinstance(out, tuple) else out
    return np.asarray(out.reshape(-1, positions))


def draw(axes, matrix, title):
    """White is 0; negative weights are red."""
    most = np.abs(matrix).max()
    axes.imshow(matrix, cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest")
    axes.set(title=title, xlabel="key", ylabel="query")


def row_of(pictures, size=2.9):
    axes = plt.subplots(1, len(pictures), figsize=(size * len(pictures), size + 0.3), layout="constrained")[1]
    for each, (title, matrix) in zip(np.atleast_1d(axes), pictures.items()):
        draw(each, matrix, title)


T, H = 32, 8
query, key = jax.random.normal(jax.random.key(1), (2, 1, T, 1, H))

softmax = {
    "every key": weights(attnlab.dot_product_attention, query, key),
    "every earlier key": weights(attnlab.dot_product_attention, query, key, is_causal=True),
}
row_of(softmax)
print("sums of the rows:", softmax["every key"].sum(axis=1).min(), "to", softmax["every key"].sum(axis=1).max())

# %% [markdown]
# Softmax attention: `w_ts = softmax_s(q_t · k_s / √H)`. A causal query sees itself and what is earlier, and nothing
# above the diagonal.
#
# ## A window of keys
#
# `local_attention` computes the same weights among the nearest keys alone. `window` counts the keys that a query sees,
# itself included. Not causal, the window lies around the query and moves inward at a border; causal, it ends at the
# query. With `stride`, neighbours share one window. `sinks` are first keys that stay visible. `dilated_attention` takes
# every d-th key.
#
# The upper row shows who may see whom, the lower row the weights.

# %%
windows = {
    "window=7": (attnlab.local_attention, {"window": 7}),
    "window=7, causal": (attnlab.local_attention, {"window": 7, "is_causal": True}),
    "window=8, stride=4": (attnlab.local_attention, {"window": 8, "stride": 4}),
    "window=7, causal, sinks=2": (attnlab.local_attention, {"window": 7, "is_causal": True, "sinks": 2}),
    "window=5, dilation=3, causal": (attnlab.dilated_attention, {"window": 5, "dilation": 3, "is_causal": True}),
}
figure, axes = plt.subplots(2, len(windows), figsize=(14, 6), layout="constrained")
for (upper, lower), (title, (attend, options)) in zip(axes.T, windows.items()):
    seen = masks.neighborhood((T,), **{name: of for name, of in options.items() if name != "sinks"})
    masks.draw(seen | (masks.causal() & masks.first_keys(options.get("sinks", 0))), (T,), axes=upper)
    upper.set(title=title)
    draw(lower, weights(attend, query, key, **options), "")

# %% [markdown]
# ## On an image
#
# The same calls take `[batch, height, width, heads, head_dim]`, and options may differ by axis. Each picture has the
# weights of one query, the red dot, over an image of 12 x 12 positions.
#
# `axial_attention` attends along one axis: a query sees its column, or its row. One layer along each axis, one after
# the other, lets it see everything. Weights of two layers are the product of their matrices.

# %%
side, (y, x) = 12, (3, 8)
image_query, image_key = jax.random.normal(jax.random.key(2), (2, 1, side, side, 1, H))


def on_image(attend, **options):
    return weights(attend, image_query, image_key, **options)


column, line = on_image(attnlab.axial_attention, axis=0), on_image(attnlab.axial_attention, axis=1)
images = {
    "local, window=(5, 7)": on_image(attnlab.local_attention, window=(5, 7)),
    "dilated, window=4, dilation=3": on_image(attnlab.dilated_attention, window=4, dilation=3),
    "axial, axis=0": column,
    "axial, axis=1": line,
    "axial, one after the other": line @ column,
}
figure, axes = plt.subplots(1, len(images), figsize=(14, 3.2), layout="constrained")
for each, (title, matrix) in zip(axes, images.items()):
    each.imshow(matrix[y * side + x].reshape(side, side), cmap="Blues", vmin=0)
    each.plot(x, y, "o", color="tab:red")
    each.set(title=title, xticks=[], yticks=[])

# %% [markdown]
# ## Clusters of tokens
#
# `routing_attention` sorts tokens by k-means, and a query sees keys of its own cluster. On the left tokens stand in
# their order, and the pattern looks like noise. On the right the same weights, with tokens sorted by cluster: blocks.
#
# Its result is a pair; the second part says which cluster each token went to.

# %%
kinds = 4 * jax.random.normal(jax.random.key(3), (4, H))
of_token = jax.random.randint(jax.random.key(4), (T,), 0, 4)
tokens = kinds[of_token][None, :, None] + query
centroids = attnlab.fit_routing(
    tokens, attnlab.init_routing(jax.random.key(5), num_heads=1, num_clusters=4, head_dim=H)
)
_, found = attnlab.routing_attention(tokens, tokens, tokens, centroids, window=T)
by_cluster = np.argsort(np.asarray(found.query_cluster[0, :, 0]), kind="stable")


def route(query, key, value, **options):
    return attnlab.routing_attention(query, key, value, centroids, window=T, scale=0.02, **options)


routed = weights(route, tokens, tokens)
row_of({"in order": routed, "sorted by cluster": routed[by_cluster][:, by_cluster]})

# %% [markdown]
# ## Through a few agents
#
# In `agent_attention` a few agents gather from all keys by softmax, and each query reads the agents by softmax. The
# weights of queries on keys are the product of the two, so their rank is at most the number of agents, here 3. Softmax
# attention over the same tokens has no such limit.

# %%
agents = jax.random.normal(jax.random.key(6), (1, 3, 1, H))
through = weights(lambda *heads, **options: attnlab.agent_attention(*heads, agents, **options), query, key)
gather = np.asarray(jax.nn.softmax(agents[0, :, 0] @ key[0, :, 0].T / math.sqrt(H)))
broadcast = np.asarray(jax.nn.softmax(query[0, :, 0] @ agents[0, :, 0].T / math.sqrt(H)))
print("largest difference to the product:", np.abs(broadcast @ gather - through).max())

figure, axes = plt.subplots(
    1, 4, figsize=(13, 3.3), layout="constrained", gridspec_kw={"width_ratios": [0.2, 1, 1, 1.1]}
)
draw(axes[0], broadcast, "broadcast")
axes[0].set(xlabel="agent", xticks=[])
draw(axes[1], gather, "gather")
axes[1].set(ylabel="agent", yticks=range(3), aspect=5)
draw(axes[2], through, "their product")
for name, matrix in (("agents", through), ("softmax", softmax["every key"])):
    axes[3].semilogy(np.maximum(np.linalg.svd(matrix, compute_uv=False), 1e-9), "o-", markersize=3, label=name)
axes[3].set(title="singular values of the weights", xlabel="number")
axes[3].legend()
plt.show()

# %% [markdown]
# ## A state in the place of keys
#
# `linear_attention` keeps no keys. It adds each `k_s v_sᵀ` to a state and reads the state with the query, so
# `w_ts = q_t · k_s`, as for every linear layer of this family, times what the state has forgotten since `s`. Published
# models differ in how the state forgets:
#
# - linear transformers: not at all; a positive feature map and a division make the weights sum to 1;
# - RetNet: by a constant factor per token;
# - Mamba-2: by a factor that each token computes (here two tokens forget almost everything);
# - DeltaNet: a token first removes what the state holds under its own key.

# %%
unit_query, unit_key = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
rate = jnp.full((1, T, 1), -0.02).at[0, jnp.array([11, 22]), 0].set(-3.0)
row_of(
    {
        "linear transformer": weights(attnlab.linear_attention, query, key, feature_map="elu", normalize=True),
        "constant decay": weights(attnlab.linear_attention, unit_query, unit_key, log_decay=jnp.array([-0.2])),
        "decay by token": weights(attnlab.linear_attention, unit_query, unit_key, log_decay=rate),
        "delta rule": weights(attnlab.linear_attention, unit_query, unit_key, beta=jnp.ones((1, T, 1))),
    }
)

# %% [markdown]
# ## The delta rule overwrites
#
# Give each letter a key of its own, orthogonal to the others, and ask for the letter that was just written. A sum
# returns all earlier values of that letter. The delta rule returns the last one alone.

# %%
letters = "ABCADBACCBADABCD"
one_key = jnp.eye(4)[jnp.array(["ABCD".index(letter) for letter in letters])][None, :, None]
strength = jnp.ones((1, len(letters), 1))
asked = {
    "sum": weights(attnlab.linear_attention, one_key, one_key),
    "delta rule": weights(attnlab.linear_attention, one_key, one_key, beta=strength),
}
figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.9), layout="constrained")
for each, (title, matrix) in zip(axes, asked.items()):
    draw(each, matrix, title)
    each.set(xticks=range(len(letters)), yticks=range(len(letters)), xticklabels=letters, yticklabels=letters)

# %% [markdown]
# ## Sums whose weights differ
#
# `inline_attention`, for images, needs two sums over all keys and no softmax: `w_ts = (q_t · (k_s - k̄) / √H + 1) / S`.
# Rows sum to 1, and two queries never share a row unless they are equal. The price is in the picture: weights may be
# negative.

# %%
inline = weights(attnlab.inline_attention, image_query[:, :5, :5], image_key[:, :5, :5])
row_of({"InLine, image of 5 x 5": inline})
print("sums of the rows:", inline.sum(axis=1).min(), "to", inline.sum(axis=1).max(), "  least weight:", inline.min())

# %% [markdown]
# ## A regression around each query
#
# Softmax attention is a weighted mean, so near the end of the data it is pulled to the side where data is.
# `local_linear_attention` fits a line (a plane) by the same weights, and reads it at the query. Here keys lie on an arc
# and the value is a coordinate of the key, plus noise. `parallax_attention` has the same form, with a learned direction
# in place of the regression; without a probe it is softmax attention.

# %%
angle = jnp.linspace(0.0, 1.5, T)
on_arc = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)[None, :, None]
truth = on_arc[..., 1:]
noisy = truth + 0.05 * jax.random.normal(jax.random.key(7), truth.shape)
options = {"scale": 20.0, "is_causal": False, "implementation": "reference"}
fitted = {
    "softmax": attnlab.dot_product_attention(on_arc, on_arc, noisy, **options),
    "local linear": attnlab.local_linear_attention(on_arc, on_arc, noisy, ridge=1e-3, **options),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(angle, noisy[0, :, 0, 0], "o", color="grey", markersize=3, label="values")
left.plot(angle, truth[0, :, 0, 0], color="grey", linewidth=1, label="without noise")
for name, out in fitted.items():
    left.plot(angle, out[0, :, 0, 0], label=name)
left.set(xlabel="angle of key and query", title="what each query gets")
left.legend()
arc_weights = weights(attnlab.local_linear_attention, on_arc, on_arc, ridge=1e-3, scale=20.0, is_causal=False)
draw(right, arc_weights, "weights of local linear attention")

# %% [markdown]
# ## All of them, from the catalog
#
# `attnlab.catalog` lists every mechanism once, with inputs. Its tests, its benchmark and this picture go over it.

# %%
columns = 7
rows = -(-len(catalog.MECHANISMS) // columns)
figure, axes = plt.subplots(rows, columns, figsize=(14, 2.3 * rows), layout="constrained")
for each in axes.flat:
    each.set_axis_off()
for each, (name, mechanism) in zip(axes.flat, catalog.MECHANISMS.items()):
    arrays = mechanism.inputs(24, batch=1, heads=1, value_dim=24)
    positions = math.prod(arrays["key"].shape[1:-2])
    arrays["value"] = np.eye(positions, dtype=np.float32).reshape(*arrays["key"].shape[:-1], positions)
    draw(each, np.asarray(mechanism(arrays, implementation="reference")).reshape(positions, positions), name)

# %% [markdown]
# ## From the reference to a fast form
#
# Without `implementation`, a call takes the fastest form that serves where it runs. `"xla"` never makes the matrix that
# you saw above; what it gives is the reference's, up to rounding.

# %%
for name, mechanism in catalog.MECHANISMS.items():
    arrays = mechanism.inputs(128)
    reference, fast = (mechanism(arrays, implementation=form) for form in ("reference", "xla"))
    print(f"{name:28} largest difference {float(jnp.abs(fast - reference).max()):.0e}")

# %% [markdown]
# ## On a GPU or TPU
#
# Nothing changes in this notebook: pick another runtime and run it again. `attnlab.explain` says which form a call
# would take on each platform, and why others cannot serve. On a TPU most mechanisms run Pallas kernels; those for
# Hopper GPUs run by name.

# %%
print(*attnlab.explain(attnlab.local_attention, query, key, key, window=7, is_causal=True), sep="\n")

# %% [markdown]
# Next: `2_own_model.ipynb` puts one primitive into a model of your own.
