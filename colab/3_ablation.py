# %% [markdown]
# # 3. A controlled ablation
#
# What does a small language model lose when it cannot see every earlier token? You ask it in a file, run it with three
# seeds, read the report, and then change the question. It takes about three minutes on two quiet CPU cores.
#
# Lines with `!` are commands that work in a terminal too.

# %%
import html
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Markdown

plt.rcParams.update({"figure.dpi": 80, "font.size": 9})

# %% [markdown]
# ## A question is a file
#
# A sweep is a [gin](https://github.com/google/gin-config) file: `Class.option = value`. This one takes a model, a text
# (the source of Python's standard library) and a training from a config that comes with attnlab, and names its arms:
# what each changes. `attnlab list` prints the other configs. `attnlab new FILE` writes a commented sweep to start from.

# %% writes="reach.gin" quick="STEPS = 21\nablate.Ablation.seeds = [0]"
# from __gin__ import dynamic_registration
# from attnlab import ablate
# from attnlab import train
#
# include 'experiments/lm/quickstart.gin'
#
# ablate.Ablation.question = 'What does a small language model lose when it cannot see every earlier token?'
# ablate.Ablation.baseline = 'softmax'
# ablate.Ablation.seeds = [0, 1, 2]
# ablate.Ablation.arms = {
#     'softmax': 'experiments/mixers/softmax.gin',
#     'local': ['experiments/mixers/local.gin', 'WINDOW = 32'],
#     'gated_linear': 'experiments/mixers/gated_linear.gin',
# }
# train.Experiment.batch_size = 8
# STEPS = 60

# %% [markdown]
# ## What would run
#
# `--dry-run` builds every arm and trains nothing: parameters, operations and the state that decoding keeps are known
# before.

# %%
# !attnlab ablate reach.gin --cache runs/all --dry-run

# %% [markdown]
# ## Run it
#
# Nine runs. What arms have in common starts from the same bits: a parameter is drawn from the seed and its path. Runs
# with one seed see the same batches in the same order. So differences can be paired by seed, and what is left in them
# is the mechanism, and chance. (`grep` keeps a line per run; leave it out for progress and the whole result.)

# %%
# !attnlab ablate reach.gin --cache runs/all 2>&1 | grep --line-buffered -o '^\[.*\] [^,]*\|^attnlab: .*'

# %% [markdown]
# ## The report
#
# `report.html` is one page that needs nothing beside it: differences with their intervals, curves, costs, what each arm
# attends to, samples, and what ran. Here it is, in a frame to scroll in. (A repository's page shows no frames; there,
# read on.)

# %%
report = Path("runs/ablate/reach/report.html").read_text()
HTML(f'<div><iframe srcdoc="{html.escape(report)}" width="100%" height="600" style="border: 0"></iframe></div>')

# %% [markdown]
# The same as text:

# %%
Markdown(Path("runs/ablate/reach/results.md").read_text())

# %% [markdown]
# ## Draw what you like
#
# The rows behind the report are JSON, one per run: settings, costs, final metrics and the whole history. On the left,
# thin lines are seeds. On the right, each dot is the difference to softmax for one seed: pairing removes what a seed
# does to all arms alike.

# %%


def rows_of(sweep):
    return [json.loads(line) for line in Path(f"runs/ablate/{sweep}/results.jsonl").read_text().splitlines()]


def draw(rows, baseline="softmax"):
    left, right = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")[1]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    final = {arm: {row["seed"]: row["final"]["loss"] for row in rows if row["arm"] == arm} for arm in arms}
    for number, arm in enumerate(arms):
        for row in (row for row in rows if row["arm"] == arm):
            curve = [(each["step"], each["loss"]) for each in row["history"] if each["split"] == "train"]
            label = arm if row["seed"] == 0 else None
            left.plot(*zip(*curve), color=f"C{number}", linewidth=0.8, label=label)
        differences = [loss - final[baseline][seed] for seed, loss in final[arm].items()]
        right.plot(differences, [number] * len(differences), "o", color=f"C{number}", alpha=0.5)
        right.plot(np.mean(differences), number, "D", color=f"C{number}")
    left.set(xlabel="step", ylabel="training loss (nats per byte)")
    left.legend()
    right.axvline(0, color="grey", linewidth=0.8)
    right.set(yticks=range(len(arms)), yticklabels=arms, xlabel=f"validation loss minus {baseline}'s")
    right.invert_yaxis()


draw(rows_of("reach"))

# %% [markdown]
# ## Change it
#
# How short may the window be? A new question includes the old file and varies one binding. Both sweeps keep their runs
# in one folder (`--cache`), under a digest of config, data and code. So the runs with a window of 32 and those of
# softmax attention are there already, and only what is new is trained.

# %% writes="windows.gin"
# from __gin__ import dynamic_registration
# from attnlab import ablate
#
# include 'reach.gin'
#
# ablate.Ablation.question = 'How short may the window be?'
# ablate.Ablation.arms = {'softmax': 'experiments/mixers/softmax.gin', 'local': 'experiments/mixers/local.gin'}
# ablate.Ablation.product = {'local': {'WINDOW': [2, 32]}}

# %%
# !attnlab ablate windows.gin --cache runs/all 2>&1 | grep --line-buffered -o '^\[.*\] [^,]*\|^attnlab: .*'

# %%
draw(rows_of("windows"))

# %% [markdown]
# Sixty steps are few: these curves have not ended. For an answer, train longer (`STEPS`), with more seeds, and let each
# arm have its own learning rate (`Ablation.learning_rates`). What came of longer runs is in
# [experiments/results](REPOSITORY/tree/main/experiments/results).
#
# Options of a single run are set in the command: `--gin.STEPS=400`, `--gin.LanguageModel.depth=4`. A name that nothing
# reads is refused, with the nearest one.
#
# ## On a GPU or TPU
#
# The same commands. Larger models pay there: `experiments/lm/small.gin` in the place of `quickstart.gin`. On several
# devices add `experiments/meshes/data.gin` (notebook 6).
#
# Next: `4_recall.ipynb` asks how much state a mechanism needs to remember.
