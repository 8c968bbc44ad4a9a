# %% [markdown]
# # 6. Several devices
#
# Meshes, sequences that devices share, training on a mesh, and a profile. On a CPU JAX can pretend to have eight
# devices, so all of this runs here; it shows what would happen, not how fast. It takes about two minutes on two CPU
# cores.

# %%
import os

os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # before jax starts; of no effect on a GPU or TPU

import collections
import gzip
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import attnlab

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})
print(len(jax.devices()), jax.devices()[0].platform, "devices")

# %% [markdown]
# ## A mesh
#
# A mesh gives devices names by axis. Here `data` is to share the batch, and `context` the positions of a sequence.
# `PartitionSpec` says which array axis each mesh axis shares. The picture is the batch and length of one array; each
# field lies on another device.

# %%
devices = len(jax.devices())
context = min(4, devices)
mesh = jax.make_mesh((devices // context, context), ("data", "context"))
layout = PartitionSpec("data", "context")

B, T, N, H = 4, 512, 4, 16
whole = jax.random.normal(jax.random.key(0), (3, B, T, N, H))
query, key, value = (jax.device_put(x, NamedSharding(mesh, layout)) for x in whole)
print(jax.typeof(query))


def draw_placement(array):
    axis = plt.subplots(figsize=(7, 1.9), layout="constrained")[1]
    number = np.zeros((B, T))
    for shard in array.addressable_shards:
        rows, columns = shard.index[:2]
        number[rows, columns] = shard.device.id
        middle = [np.mean(range(size)[each]) for size, each in zip((B, T), (rows, columns))]
        axis.text(middle[1], middle[0], f"device {shard.device.id}", ha="center", va="center")
    axis.imshow(number, aspect="auto", cmap="Pastel1", vmin=0, vmax=8, interpolation="nearest")
    axis.set(xlabel="position", ylabel="example", yticks=range(B))


draw_placement(query)

# %% [markdown]
# ## A sequence that devices share
#
# Call a mechanism as always. The result lies as the query does, and is what one device gives, up to rounding.

# %%
calls = {
    "local": lambda *heads: attnlab.local_attention(*heads, window=64, is_causal=True),
    "linear": lambda *heads: attnlab.linear_attention(*heads, feature_map="elu", normalize=True),
    "softmax": lambda *heads: attnlab.dot_product_attention(*heads, is_causal=True),
    "axial": lambda *heads: attnlab.axial_attention(*heads, axis=0),
    "inline": lambda *heads: attnlab.inline_attention(*heads),
}
for name, call in calls.items():
    out = call(query, key, value)
    difference = float(jnp.abs(out - call(*whole)).max())
    print(f"{name:8} {jax.typeof(out)}  largest difference to one device: {difference:.0e}")

# %% [markdown]
# ## What devices send one another
#
# The compiled program tells. No mechanism gathers all keys or values in one place. A window takes the end of its
# neighbour's part (collective-permute); linear attention exchanges the states that parts leave (all-gather, of states
# alone); softmax attention passes keys and values round in a ring; axial attention swaps lines for positions
# (all-to-all); InLine adds sums (all-reduce). Bars are the MB that one device gets by these operations, beside the size
# of its own part of the keys and values.

# %%
KINDS = ("collective-permute", "all-gather", "all-to-all", "all-reduce")


def exchanged(call):
    """MB by kind of exchange, as the compiled program's text has them."""
    found = collections.Counter()
    for line in jax.jit(call).lower(query, key, value).compile().as_text().splitlines():
        made = re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if made:
            shapes = re.findall(r"f32\[([\d,]*)\]", made.group(1))
            found[made.group(2)] += sum(4 * np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes) / 1e6
    return found


figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
left = np.zeros(len(calls))
by_call = [exchanged(call) for call in calls.values()]
for kind in KINDS:
    sizes = np.array([found[kind] for found in by_call])
    axis.barh(list(calls), sizes, left=left, label=kind)
    left += sizes
part = (key.nbytes + value.nbytes) / devices / 1e6
axis.axvline(part, color="grey", linestyle=":", label="keys and values of a part")
axis.invert_yaxis()
axis.set(xlabel="MB", xlim=(0, 1.1 * left.max()))
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## In a `shard_map` of your own
#
# Inside `jax.shard_map` a call sees its part alone, and takes it for the whole. `attnlab.positions_over` says which
# axis shares the positions.


# %%
def local(query, key, value):
    with attnlab.positions_over("context"):
        return attnlab.local_attention(query, key, value, window=64, is_causal=True)


shared = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=layout, out_specs=layout))(query, key, value)
print("largest difference to one device:", float(jnp.abs(shared - calls["local"](*whole)).max()))

# %% [markdown]
# ## Train on a mesh
#
# A run takes one device unless its config has a mesh. `experiments/meshes/data.gin` shares the batch among all;
# `--gin.Mesh.fsdp=4` and the like give devices to parameters (`fsdp`), heads (`tensor`) or positions (`context`). The
# same run on one device and on two: the same initial bits, and losses that differ by rounding.

# %% quick="STEPS = 21"
STEPS = 30

# %%
one = f"experiments/lm/quickstart.gin --gin.STEPS={STEPS} --workdir runs/one"
two = f"experiments/lm/quickstart.gin experiments/meshes/data.gin --gin.STEPS={STEPS} --workdir runs/two --profile 4"
# !JAX_NUM_CPU_DEVICES=1 attnlab train {one} 2>&1 | grep '^validation:\|^attnlab: '
# !JAX_NUM_CPU_DEVICES=2 attnlab train {two} 2>&1 | grep '^validation:\|^attnlab: '

# %% [markdown]
# ## A profile
#
# `--profile 4` traced four steps of the second run into `runs/two/profile`. `pip install xprof` and
# `xprof --logdir runs/two/profile` open it in a browser. The trace is a list of operations with their times, so a first
# look needs no program: what takes the time?

# %%
trace = next(Path("runs/two/profile").rglob("*.trace.json.gz"))
events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
operations = [event for event in events if "hlo_op" in event.get("args", {})]
spent = collections.Counter()
for event in operations:
    spent[re.sub(r"[.\d]+$", "", event["args"]["hlo_op"])] += event["dur"] / 1e3
names, milliseconds = zip(*spent.most_common(10))

figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
axis.barh(names, milliseconds, color=["tab:red" if "all-" in name else "tab:blue" for name in names])
axis.invert_yaxis()
axis.set(xlabel="ms in four steps, both devices", title="operations of the training step (red: exchanges)")
plt.show()

# %% [markdown]
# A fusion is several operations that XLA compiled into one. Here two pretended devices share two cores; on accelerators
# the same list says whether exchanges or products take the time.
#
# ## On a GPU or TPU
#
# With one device the meshes above have one place, and nothing is exchanged. With several, the cells run as they are;
# leave out `JAX_NUM_CPU_DEVICES`. A TPU pod slice, Kubernetes and SLURM need one process per host:
# [docs/pods.md](REPOSITORY/blob/main/docs/pods.md) has the commands. `attnlab compile CONFIG --topology v5p:4x4x8`
# tells before, without a TPU, whether a run fits and what it exchanges.
