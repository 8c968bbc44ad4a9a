"""Wrong configs of many kinds: each is refused when it is built, in one line, and nothing is written."""

import sys

import jax  # noqa: F401  (a command that imports it says so)
import pytest

from attnlab import cli

LM, DIGITS = "experiments/lm/quickstart.gin", "experiments/image/digits.gin"
MIXERS, RECALL, IMAGE = "experiments/mixers", "experiments/recall", "experiments/image"
SWEEP = "experiments/sweeps/quickstart.gin"

# By what is wrong: the config files, what --gin sets, and what the line says.
TRAIN = {
    "rotary positions turn pairs of channels": ([LM], ["SoftmaxAttention.head_dim=7"], "head_dim: got 7; rotary"),
    "key heads that do not divide": ([LM], ["SoftmaxAttention.num_key_heads=3"], "num_key_heads: got 3; must divide"),
    "an edge that no window has": ([LM, f"{MIXERS}/local.gin"], ["LocalAttention.edge=wrap"], "edge: got 'wrap'"),
    "a window of an image on a text": ([LM, f"{MIXERS}/local.gin"], ["WINDOW=(8, 8)"], "window: got (8, 8); need one"),
    "no head left to route": ([LM, f"{MIXERS}/routing.gin"], ["RoutingAttention.local_heads=4"], "local_heads: got 4"),
    "a floor of a causal normalizer": (
        [LM, f"{MIXERS}/linear.gin"],
        ["LinearAttention.normalizer_floor=1.0"],
        "normalizer_floor: got 1.0; needs normalize=False and is_causal=False",
    ),
    "agents pooled from later tokens": (
        [LM, f"{MIXERS}/agent.gin"],
        ["AgentAttention.agents=(2, 2)"],
        "agents: got (2, 2) with is_causal=True",
    ),
    "sinks of a dilated window": (
        [LM, f"{MIXERS}/dilated.gin"],
        ["DilatedAttention.sinks=2"],
        "sinks: got 2; dilated attention has none",
    ),
    "a mixer of images in a text model": ([LM, f"{MIXERS}/inline.gin"], [], "InlineAttention has no causal form"),
    "an order of tokens in an image": (
        [DIGITS, f"{MIXERS}/linear.gin"],
        ["LinearAttention.beta=1.0"],
        "beta: got 1.0 with is_causal=False",
    ),
    "a convolution over earlier pixels": (
        [DIGITS],
        ["SoftmaxAttention.convolution=4"],
        "convolution: got 4 with is_causal=False",
    ),
    "a negative ridge": ([LM, f"{MIXERS}/local_linear.gin"], ["RIDGE=-1.0"], "ridge: got -1.0; need"),
    "patches that do not tile": ([DIGITS], ["ImageClassifier.patch=5"], "patch: got 5; must divide"),
    "fewer classes than labels": ([DIGITS], ["ImageClassifier.classes=9"], "classes: got 9; scikit-learn digits"),
    "a shift out of the image": ([DIGITS], ["ImageClassificationTask.shift=8"], "shift: got 8; need 0 to 7"),
    "fewer tokens than the text has": ([LM], ["LanguageModel.vocabulary=100"], "vocabulary: got 100; the tokens of"),
    "positions for half the sequence": ([LM], ["LanguageModel.max_length=64"], "max_length is 64"),
    "no half to probe": (
        [LM],
        ["LanguageTask.sequence_length=3", "LanguageTask.probe_future=true"],
        "probe_future: got True with sequence_length 3",
    ),
    "an odd length of pairs": ([f"{RECALL}/mqar.gin"], ["MultiQueryRecall.length=63"], "length: got 63; need an even"),
    "a needle before the start": ([f"{RECALL}/needle.gin"], ["Needle.distances=[300]"], "distances: got [300]; need"),
    "too few blanks": ([f"{RECALL}/selective_copy.gin"], ["SelectiveCopy.tokens=100"], "tokens: got 100; need 1 to"),
    "5040 permutations": ([f"{RECALL}/permutations.gin"], ["Permutations.points=7"], "points: got 7; need 2 to 6"),
    "no room for the start token": (
        [f"{IMAGE}/digits_raster.gin"],
        ["LanguageModel.vocabulary=17"],
        "vocabulary: got 17; scikit-learn digits need 18",
    ),
    "heads that split no channel": (
        [f"{IMAGE}/digits_axial.gin"],
        ["AxialTransformer.heads=7"],
        "heads: got 7; must divide features",
    ),
    "a channel before the first": (
        [f"{IMAGE}/digits_axial.gin"],
        ["AxialTransformer.exterior_layers=1"],
        "exterior_layers: got 1; need 0, as the only channel",
    ),
    "crops larger than the photograph": (
        [f"{IMAGE}/photos_axial.gin"],
        ["photo_crops.size=400"],
        "size: got 400; need 4 to 128",
    ),
    "a mean that never forgets": ([LM], ["OptimizerOptions.b2=1.0"], "b2: got 1.0; need at least 0 and below 1"),
    "a rate that ends above its peak": ([LM], ["OptimizerOptions.final_fraction=1.5"], "final_fraction: got 1.5; need"),
    "a model of another kind of data": ([LM], ["Experiment.model=@SequenceRegressor()"], "SequenceRegressor.channels"),
    "a task that is not called": ([LM], ["Experiment.task=@LanguageTask"], "task: got <class"),
    "a mixer that is called": ([LM], ["MIXERS=[@nn.LocalAttention()]"], "LocalAttention.features: nothing sets it"),
    "data among the mixers": ([LM], ["MIXERS=[@nn.SoftmaxAttention, @data.Copy]"], "mixers: got [<class"),
    "a scope that nothing is called in": ([LM], ["first/LanguageModel.depth=3"], "first/LanguageModel.depth: nothing"),
    "a macro that stands for itself": ([LM], ["STEPS=%STEPS"], "macro %STEPS stands for itself"),
    "a kernel for another machine": (
        [LM],
        ["SoftmaxAttention.implementation='pallas_tpu'"],
        "implementation: got 'pallas_tpu'; the devices are cpus",
    ),
    "numbers of eight bits": ([LM], ["LanguageModel.dtype='float8_e4m3fn'"], "dtype: got 'float8_e4m3fn'; need a"),
    "numbers of 64 bits": ([LM], ["LanguageModel.dtype='float64'"], "dtype: got 'float64'; needs jax_enable_x64"),
    "a colon for a dot": ([LM], ["LanguageModel:depth=3"], "cannot read it"),
}
ABLATE = {
    "a varied option that the arm has not": (
        ["Ablation.product={'softmax': {'LocalAttention.sinks': [1, 2]}}", "Ablation.baseline=local"],
        "product: got LocalAttention.sinks for softmax; nothing that the arm builds reads it",
    ),
    "one value, not a list": (
        ["Ablation.product={'local': {'WINDOW': 8}}"],
        "product: got 8 for WINDOW of local; need a list",
    ),
    "a text for a list of seeds": (["Ablation.seeds='01'"], "seeds: got '01'; need a list"),
    "half a seed": (["Ablation.seeds=[0.5]"], "seeds: got [0.5]; need an int"),
    "the same rate twice": (["Ablation.learning_rates=[0.1, 0.1]"], "learning_rates: got [0.1, 0.1]; need at least"),
    "a rate that the search replaces": (
        ["Ablation.learning_rates=[0.1, 0.2]", "OptimizerOptions.learning_rate=1.0"],
        "OptimizerOptions.learning_rate: the sweep sets it itself, from Ablation.learning_rates",
    ),
    "a macro that an arm sets": (["WINDOW=16"], "--gin.WINDOW: arms set it themselves, local (WINDOW = 32); change it"),
    "an option that an arm sets": (
        [
            "Ablation.arms={'softmax': 'experiments/mixers/softmax.gin', 'wide': ['experiments/mixers/softmax.gin', "
            "'models.LanguageModel.features = 64']}",
            "LanguageModel.features=32",
        ],
        "--gin.LanguageModel.features: arms set it themselves, wide (models.LanguageModel.features = 64); change it",
    ),
    "an option that an arm varies": (
        ["Ablation.product={'local': {'LocalAttention.window': [8, 16]}}", "LocalAttention.window=4"],
        "--gin.LocalAttention.window: arms set it themselves, local (Ablation.product); change it there, or add "
        "'LocalAttention.window = 4' to an arm's list, in experiments/sweeps/quickstart.gin",
    ),
    "a knob that is a list": (["Ablation.match=flops", "Ablation.knobs=['WINDOW']"], "knobs: got ['WINDOW']; need an"),
    "an arm made of a number": (["Ablation.arms={'softmax': 3}"], "arms: got 3 for softmax; need a file"),
    "an arm whose file is a word": (["Ablation.arms={'softmax': 'linear'}"], "mean 'experiments/mixers/linear.gin'"),
    "an accuracy that only its group has": (["Ablation.metric=solved"], "metric: got 'solved'; softmax has accuracy"),
    "a state of images": (["Ablation.match=state_size", "Ablation.knobs=NO"], "macro NO is set but nothing uses it"),
}


def refused(arguments, folder, capsys):
    """The one line that a command ends with, which leaves nothing."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("attnlab: ")
    assert error.count("\n") == 1
    assert len(error) < 500
    assert list(folder.rglob("*")) == []
    return error


@pytest.mark.parametrize("name", TRAIN)
def test_one_run(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources, overrides, message = TRAIN[name]
    options = [f"--gin.{override}" for override in overrides]
    assert message in refused(["train", *sources, *options], tmp_path, capsys)


@pytest.mark.parametrize("name", ABLATE)
def test_a_sweep_already_when_it_is_planned(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides, message = ABLATE[name]
    options = [f"--gin.{override}" for override in overrides]
    assert message in refused(["ablate", SWEEP, "--dry-run", *options], tmp_path, capsys)


OWN_MIXER = """
from attnlab import nn

class OwnMixer(nn.Attention):
    def mix(self, query, key, value, x, segment_ids):
        return value

    def mechanism_flops(self, space):
        return 0

    def mechanism_step(self, cache, query, key, value, x):
        return value, cache

    def init_mechanism_cache(self, batch, max_length):
        return None

    def {method}(self, *arguments, **options):
        {body}
"""
AT = ", at {module}:18"
# By what a mixer of one's own does: its method, the body of that, and what the line says.
OWN = {
    "gives one token less": (
        "mix",
        "return arguments[2][:, 1:]",
        "OwnMixer.mix: got float32[16,127,4,32]; need an array",
    ),
    "gives nothing": ("mix", "pass", "OwnMixer.mix: got None; need an array [16, 128, 4, 32]"),
    "calls what is not there": ("mix", "return self.nothing", "has no attribute 'nothing' (in Experiment)" + AT),
    "looks up what is not there": ("mix", "return {}['nothing']", "KeyError: 'nothing' (in Experiment)" + AT),
    "calls itself": ("mix", "return self.mix(*arguments)", "maximum recursion depth exceeded (in Experiment)" + AT),
    "costs nothing known": ("mechanism_flops", "pass", "OwnMixer.mechanism_flops: got None; need a number"),
    "costs what is no number": (
        "mechanism_flops",
        "return float('nan')",
        "OwnMixer.mechanism_flops: got nan; need a finite number",
    ),
    "sees what is later": (
        "mix",
        "return arguments[2] + arguments[2].mean(axis=1, keepdims=True)",
        "OwnMixer is to be causal and sees later tokens: its output at position 0 changes with the tokens from 1 on",
    ),
    "has no cache after all": ("init_mechanism_cache", "raise ValueError('full')", "full (in Experiment)" + AT),
}


@pytest.mark.parametrize("name", OWN)
def test_a_mixer_of_ones_own_that_fails(name, tmp_path, tmp_path_factory, capsys, monkeypatch):
    """Also one whose costs cannot be told, before an arm is trained for nothing."""
    method, body, message = OWN[name]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path_factory.mktemp("own")
    module = folder / f"own_{list(OWN).index(name)}.py"
    module.write_text(OWN_MIXER.format(method=method, body=body))
    imports = f"from __gin__ import dynamic_registration\nimport {module.stem}\n"
    (folder / "own.gin").write_text(f"{imports}MIXERS = [@{module.stem}.OwnMixer]\n")
    line = refused(["train", LM, str(folder / "own.gin")], tmp_path, capsys)
    assert message.replace("{module}", str(module)) in line
