# %% [markdown]
# # 4. Recall against the size of the state
#
# To decode, softmax attention keeps the keys and values of all tokens. A window or a linear mechanism keeps a state of
# fixed size. What does that cost? Here models learn to look up what they have read, with states of several sizes. It
# takes about three minutes on two quiet CPU cores.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from attnlab import data

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

# %% [markdown]
# ## The task
#
# Multi-query associative recall ([Arora et al. 2023](https://arxiv.org/abs/2312.04927)): pairs of a key and its value,
# then keys again, each asking for its value. All else is noise. Examples are drawn as they are asked for, and none
# comes twice.

# %%
source = data.MultiQueryRecall(length=64, pairs=4, vocabulary=64)
example = source.draw(np.random.default_rng(3), 0)
inputs, targets = example["inputs"], example["targets"]

figure, axis = plt.subplots(figsize=(14, 1.9), layout="constrained")
position = np.arange(len(inputs))
is_pair, is_question = position < 8, targets >= 0
colors = np.where(is_question, "tab:red", np.where(is_pair & (position % 2 == 0), "tab:blue", "lightgrey"))
colors = np.where(is_pair & (position % 2 == 1), "tab:green", colors)
axis.bar(position, 1, width=0.94, color=colors)
for place, token, target in zip(position, inputs, targets):
    known = is_pair[place] or is_question[place]
    axis.text(place, 0.5, token, ha="center", va="center", color="white" if known else "grey", fontsize=8)
    if target >= 0:
        axis.text(place, 1.15, f"→ {target}", ha="center", fontsize=9)
axis.set(xlim=(-0.6, 63.6), ylim=(0, 1.5), yticks=[], xlabel="position")
axis.set_title("keys (blue), their values (green), questions (red) with the answers above them")
axis.spines[:].set_visible(False)

# %% [markdown]
# ## The sweep
#
# Two layers of width 32, one head, and a short convolution before each mixer, so that a key and its value can meet. The
# arms: softmax attention; windows of 4 to 32 tokens; DeltaNet, whose state is a matrix of `head_dim x head_dim` per
# layer. `product` makes an arm of each value.

# %% writes="recall.gin" quick="STEPS = 21\nablate.Ablation.product = {}"
# from __gin__ import dynamic_registration
# from attnlab import ablate
# from attnlab import data
# from attnlab import models
# from attnlab import nn
# from attnlab import train
#
# include 'experiments/recall/mqar.gin'
#
# ablate.Ablation.question = 'How much state does recall need?'
# ablate.Ablation.baseline = 'softmax'
# ablate.Ablation.metric = 'accuracy'
# ablate.Ablation.higher_is_better = True
# ablate.Ablation.seeds = [0]
# ablate.Ablation.arms = {
#     'softmax': 'experiments/mixers/softmax.gin',
#     'local': 'experiments/mixers/local.gin',
#     'delta': 'experiments/mixers/delta.gin',
# }
# ablate.Ablation.product = {
#     'local': {'WINDOW': [4, 16, 32]},
#     'delta': {'nn.LinearAttention.head_dim': [4, 8, 32]},
# }
# data.MultiQueryRecall.vocabulary = 64
# models.LanguageModel.vocabulary = 64
# models.LanguageModel.features = 32
# train.Experiment.batch_size = 64
# train.SequenceTask.validation_examples = 256
# PAIRS = 4
# STEPS = 200

# %%
# !attnlab ablate recall.gin 2>&1 | grep --line-buffered -o '^\[.*\] [^,]*\|^attnlab: .*'

# %% [markdown]
# ## Accuracy against state
#
# The state is what one sequence keeps to decode the token after 64: keys, values, matrices and the convolutions' last
# inputs, in numbers. Each dot is an arm.

# %%
rows = [json.loads(line) for line in Path("runs/ablate/recall/results.jsonl").read_text().splitlines()]
chance = 1 / (source.vocabulary // 2)

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for family in ("softmax", "local", "delta"):
    ours = [row for row in rows if row["arm"].startswith(family)]
    mine = sorted((row["state_size"], row["final"]["accuracy"], row["arm"]) for row in ours)
    axis.semilogx(*zip(*((state, accuracy) for state, accuracy, _ in mine)), "o-", label=family)
    for state, accuracy, arm in mine:
        setting = arm.partition("[")[2].rstrip("]")
        axis.annotate(setting, (state, accuracy), xytext=(5, -11), textcoords="offset points", fontsize=8)
axis.axhline(chance, color="grey", linewidth=0.8, linestyle=":", label="guessing a value")
axis.set(xlabel="numbers kept per sequence", ylabel="accuracy of the answers", ylim=(-0.05, 1.08))
axis.legend()
plt.show()

# %% [markdown]
# A window answers what lies inside of its reach: with two layers of a window of 16, about 30 positions back. A larger
# distance is out of its sight, whatever it learns. DeltaNet forgets nothing by distance, but must keep all pairs apart
# in one matrix.
#
# One seed and 200 steps say what these models learn *soon*, not what they can learn. Try `STEPS = 600`, or
# `PAIRS = 8`, in the cell above.
#
# ## What grows with length
#
# Nothing is trained here: the size of the state follows from the mixer. Softmax attention alone keeps more for a longer
# text.

# %%
from attnlab import nn

mixers = {
    "softmax": nn.SoftmaxAttention(32, num_heads=1, is_causal=True),
    "local, window=32": nn.LocalAttention(32, num_heads=1, is_causal=True, window=32),
    "delta, head_dim=32": nn.LinearAttention(32, num_heads=1, is_causal=True, beta=1.0),
}
lengths = 2 ** np.arange(3, 15)
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
for name, mixer in mixers.items():
    axis.loglog(lengths, [mixer.state_size(int(length)) for length in lengths], "o-", markersize=3, label=name)
axis.set(xlabel="tokens read", ylabel="numbers kept per layer")
axis.legend()
plt.show()

# %% [markdown]
# ## On a GPU or TPU
#
# The same file with the published size: leave out the lines for `vocabulary` (8192 then) and `features`, and take
# `STEPS = 2000`. `experiments/sweeps/recall_state.gin` is such a sweep, and
# [its results](REPOSITORY/tree/main/experiments/results/recall_state) have ten arms.
#
# Next: `5_new_mechanism.ipynb` adds a mechanism of your own.
