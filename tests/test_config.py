"""Configs: gin files wire objects, later sources win, and nothing misspelled passes."""

import math
import sys
import types

import numpy as np
import pytest

from attnlab import config, models, nn
from attnlab.errors import UserError
from attnlab.train.mesh import described

BASE = "experiments/lm/quickstart.gin"
LOCAL = "experiments/mixers/local.gin"
IMAGES = "experiments/image/digits.gin"
SWEEP = "experiments/sweeps/quickstart.gin"
OF_MIXERS = [path for path in config.shipped() if "/mixers/" in path]
# Those without a causal form: the command in their head trains an image model.
FOR_IMAGES = [path for path in OF_MIXERS if "train experiments/image/" in config.find(path).read_text()]


def build(*overrides, sources=(BASE,), root="LanguageModel"):
    return config.build(list(sources), overrides, root=root)


def write_data(folder):
    """Files in the formats of the configs that read some: by config, the override that names them."""
    text, images, colour = folder / "text", folder / "images", folder / "colour"
    for made in (text, images, colour):
        made.mkdir()
    (folder / "input.txt").write_text("to be, or not to be\n" * 200)
    for part in ("train", "valid"):
        (text / f"{part}.txt").write_text("a rose is a rose\n" * 200)
    for part in ("train", "t10k"):
        for what, shape in (("images", (3, 28, 28)), ("labels", (3,))):
            head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            (images / f"{part}-{what}").write_bytes(head + bytes(math.prod(shape)))
    for part in ("train_data_batch_1", "val_data"):
        np.savez(colour / f"{part}.npz", data=np.zeros((2, 3 * 32 * 32), np.uint8), labels=[1, 2])
    return {
        "experiments/image/imagenet32_axial.gin": f"IMAGES='{colour}'",
        "experiments/lm/shakespeare.gin": f"TEXT='{folder / 'input.txt'}'",
        "experiments/lm/wikitext2.gin": f"TEXT='{text}'",
        **{f"experiments/image/{name}.gin": f"IMAGES='{images}'" for name in ("mnist", "mnist_axial", "mnist_raster")},
    }


@pytest.mark.long
def test_every_config_that_comes_along_builds_what_it_is_for(tmp_path):
    overrides = write_data(tmp_path)
    assert len(config.shipped()) >= 10
    for path in config.shipped():
        assert config.describe(path), f"{path} does not describe itself in its first line"
        kind = path.split("/")[1]
        if kind == "mixers":
            base, root = (IMAGES, "ImageClassifier") if path in FOR_IMAGES else (BASE, "LanguageModel")
            config.build([base, path], root=root)
        elif kind == "meshes":
            config.build([BASE, path], root="Experiment")
        elif kind == "pods":
            with described([types.SimpleNamespace(platform="tpu")] * 128):
                config.build([path], root="Experiment")
        else:
            given = [overrides[path]] if path in overrides else []
            config.build([path], given, root="Ablation" if kind == "sweeps" else "Experiment")


@pytest.mark.parametrize("mixer", [path for path in OF_MIXERS if path not in FOR_IMAGES])
def test_every_mixer_serves_the_language_model(mixer):
    model = build(sources=[BASE, mixer]).value
    assert all(block.mixer.is_causal for block in model.layers)


def test_overrides_win_by_macro_and_by_option_and_in_full_or_short():
    model = build(
        "WINDOW=7",
        "LanguageModel.depth=3",
        "models.LanguageModel.features=64",
        sources=[BASE, LOCAL],
    ).value
    assert [block.mixer.window for block in model.layers] == [7, 7, 7]
    assert model.features == 64


def test_an_option_may_replace_a_macro_that_a_file_uses():
    model = build("LocalAttention.window=9", sources=[BASE, LOCAL]).value
    assert model.layers[0].mixer.window == 9


def test_an_override_may_name_what_no_file_does():
    assert type(build("MIXERS=[@LinearAttention]").value.layers[0].mixer).__name__ == "LinearAttention"


def test_bare_words_are_strings():
    model = build("LinearAttention.decay=retention", sources=[BASE, "experiments/mixers/gated_linear.gin"]).value
    assert model.layers[0].mixer.decay == "retention"


def test_a_binding_is_a_source_too():
    assert len(build(sources=[BASE, "models.LanguageModel.depth = 5"]).value.layers) == 5


def test_the_resolved_config_has_every_option_and_builds_the_same(tmp_path):
    built = build("LanguageModel.depth=3", sources=[BASE, LOCAL])
    assert built.values["LanguageModel.depth"] == "3"
    assert built.values["LanguageModel.dropout_rate"] == "0.0"
    assert built.values["LocalAttention.num_heads"] == "4"
    assert built.values["WINDOW"] == "64"
    (tmp_path / "again.gin").write_text(built.text)
    assert build(sources=[str(tmp_path / "again.gin")]).values == built.values


def test_one_config_leaves_nothing_behind_for_the_next():
    build("LanguageModel.depth=3")
    assert len(build().value.layers) == 2


def test_modules_of_ones_own_are_wired_the_same_way(tmp_path, monkeypatch):
    (tmp_path / "mymixers.py").write_text(
        "from attnlab import nn\n"
        "class Mine(nn.SoftmaxAttention):\n"
        "    def __init__(self, features, *, extra, **shared):\n"
        "        super().__init__(features, **shared)\n"
        "        self.extra = extra\n"
    )
    (tmp_path / "mine.gin").write_text(
        "from __gin__ import dynamic_registration\nimport mymixers\n"
        "MIXERS = [@mymixers.Mine]\nmymixers.Mine.extra = 3\nmymixers.Mine.num_heads = 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    built = build(sources=[BASE, str(tmp_path / "mine.gin")])
    mixer = built.value.layers[0].mixer
    assert (mixer.extra, mixer.num_heads) == (3, 2)
    assert built.modules == ("attnlab.models.lm", "mymixers")
    assert build().modules == ("attnlab.models.lm", "attnlab.nn.mixers.softmax")


def test_what_configs_name_is_known_without_building_it():
    fragment = dict(config.named([LOCAL], ["WINDOW=3", "LanguageModel.depth=0"]))
    assert fragment == {nn.LocalAttention: {"window": 3}, models.LanguageModel: {"depth": 0}}
    axes = config.named(["experiments/mixers/axial.gin"])
    assert axes == [(nn.AxialAttention, {"axis": 0}), (nn.AxialAttention, {"axis": 1})]
    whole = dict(config.named([BASE]))
    assert whole[nn.SoftmaxAttention] == {}
    assert whole[models.LanguageModel]["vocabulary"] == 256
    with pytest.raises(UserError, match="did you mean 'LanguageModel'"):
        config.named([LOCAL], ["LanguageModle.depth=2"])


def test_options_are_built_and_what_they_are_for_is_not_called():
    # An Experiment of 0 steps is refused.
    options = config.options([BASE], ["STEPS=0", "LanguageModel.depth=3"], root="Experiment")
    assert options["steps"] == 0
    assert len(options["model"].layers) == 3
    with pytest.raises(UserError, match="depth: got 0"):
        config.options([BASE], ["LanguageModel.depth=0"], root="Experiment")


@pytest.mark.parametrize(
    ("sources", "overrides", "message"),
    [
        (["experiments/lm/quickstrat.gin"], [], r"no file .*did you mean 'experiments/lm/quickstart.gin'"),
        ([BASE], ["LanguageModle.depth=2"], "unknown name 'LanguageModle'; did you mean 'LanguageModel'"),
        ([BASE], ["models.LanguageModle.depth=2"], r"unknown name 'models.LanguageModle'; did you mean"),
        ([BASE], ["LanguageModel.dept=2"], "LanguageModel has no option 'dept'; did you mean 'depth'"),
        (
            [BASE, LOCAL],
            ["LocalAttention.windw=2"],
            "no option 'windw'; did you mean 'window'",
        ),
        ([BASE], ["STPES=2"], "macro STPES is set but nothing uses it; did you mean 'STEPS'"),
        (
            [BASE, "models.LanguageModel.depth = %DEPHT"],
            ["DEPTH=3"],
            "macro %DEPHT is used but never set; did you mean",
        ),
        (
            [BASE, "MIXERS = [@nn.LocalAtention]"],
            [],
            "unknown name 'nn.LocalAtention'; did you mean 'nn.LocalAttention'",
        ),
        ([SWEEP], ["Ablatin.seeds=[0]"], "unknown name 'Ablatin'; did you mean 'Ablation'"),
        ([SWEEP], ["ablate.Ablaton.seeds=[0]"], "unknown name 'ablate.Ablaton'; did you mean 'ablate.Ablation'"),
        ([BASE], ["LanguageModel.depth"], "override 'LanguageModel.depth' is not NAME=VALUE"),
        ([BASE], ["LanguageModel.depth=[1,"], "config: "),
        ([BASE], ["LanguageModel.depth=0"], r"depth: got 0; need 1 to 256 \(in LanguageModel\)"),
        ([LOCAL], [], "configures no LanguageModel"),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_name(sources, overrides, message):
    with pytest.raises(UserError, match=message) as raised:
        config.build(sources, overrides, root="LanguageModel")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_an_unknown_name_in_a_file_is_given_with_its_line(tmp_path):
    (tmp_path / "bad.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom attnlab import models\n\nmodels.LanguageModl.depth = 3\n"
    )
    with pytest.raises(UserError, match=r"unknown name 'models.LanguageModl'; .* \(.*bad.gin, line 4\)"):
        build(sources=[str(tmp_path / "bad.gin")])


@pytest.mark.parametrize(
    ("override", "option", "value"),
    [
        ("LanguageModel.remat=true", "remat", True),
        ("LanguageModel.remat=TRUE", "remat", True),
        ("LanguageModel.remat=false", "remat", False),
        ("LanguageModel.remat= False", "remat", False),
        ("LanguageModel.max_length=none", "max_length", None),
        ("LanguageModel.max_length=null", "max_length", None),
        ("LanguageModel.max_length=2e2", "max_length", 200),
        ("LanguageModel.features=64.0", "features", 64),
        ("LanguageModel.features=+64", "features", 64),
        ("LanguageModel.features=1_28", "features", 128),
        ("LanguageModel.dropout_rate=0", "dropout_rate", 0.0),
        ("LanguageModel.dropout_rate=1e-1", "dropout_rate", 0.1),
        ("LanguageModel.dropout_rate=.5", "dropout_rate", 0.5),
        ("LanguageModel.dtype=bfloat16", "dtype", "bfloat16"),
    ],
)
def test_words_and_numbers_mean_what_they_say(override, option, value):
    got = getattr(build(override).value, option)
    assert got == value
    assert type(got) is type(value)


def test_none_is_a_word_where_the_option_takes_one():
    gated = [BASE, "experiments/mixers/gated_linear.gin"]
    assert build("LinearAttention.decay=none", sources=gated).value.layers[0].mixer.decay == "none"


def test_a_macro_takes_what_the_options_take_that_it_stands_for(tmp_path):
    file = tmp_path / "macro.gin"
    imports = "from __gin__ import dynamic_registration\nfrom attnlab import models\n"
    file.write_text(f"include '{BASE}'\n{imports}models.LanguageModel.remat = %REMAT\nREMAT = False\n")
    assert build("REMAT=true", sources=[str(file)]).value.remat is True
    experiment = build("STEPS=1e3", "Experiment.evaluation_batches=None", root="Experiment").value
    assert (experiment.steps, experiment.evaluation_batches) == (1000, None)
    assert build("LanguageTask.probe_future=true", root="Experiment").value.task.probe_future is True


def test_a_name_of_digits_is_still_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").write_bytes(bytes(range(200)) * 10)
    built = build("LanguageTask.corpus=@text_files()", "text_files.path=2024", root="Experiment")
    assert built.value.task.corpus.name == "2024"


@pytest.mark.parametrize("word", ["off", "no", "0", "1", "'false'", "maybe"])
def test_what_is_neither_true_nor_false_is_refused(word):
    with pytest.raises(UserError, match=r"scan_layers: got .*; need True or False \(in LanguageModel\)"):
        build(f"LanguageModel.scan_layers={word}")
    with pytest.raises(UserError, match=r"remat: got .*; need True"):
        build(f"LanguageModel.remat={word}")


@pytest.mark.parametrize("word", ["false", "true", "none"])
def test_a_file_is_python_and_says_so(word, tmp_path):
    (tmp_path / "words.gin").write_text(f"A = 1\nWINDOW = {word}\n")
    with pytest.raises(UserError, match=rf"cannot read {word}; .* True, False and None \(.*words\.gin, line 2\)"):
        build(sources=[BASE, LOCAL, str(tmp_path / "words.gin")])


@pytest.mark.parametrize(
    ("sources", "override", "message"),
    [
        ([BASE], "LocalAttention.window=16", "LocalAttention.window: nothing that is built reads it; what is built: "),
        ([BASE, LOCAL], "SoftmaxAttention.num_heads=2", "reads it; did you mean 'LocalAttention.num_heads'?"),
        ([BASE, LOCAL], "LocalAttention.is_causal=False", "LocalAttention.is_causal: nothing that is built reads it"),
        ([BASE, LOCAL], "x/LocalAttention.sinks=2", "x/LocalAttention.sinks: nothing that is built reads it"),
        (["experiments/recall/mqar.gin"], "LocalAttention.num_heads=2", "did you mean 'SoftmaxAttention.num_heads'?"),
        (["experiments/mixers/axial.gin"], "AxialAttention.axis=0", "AxialAttention.axis: nothing that is built"),
    ],
)
def test_what_nothing_reads_is_refused(sources, override, message):
    if sources == ["experiments/mixers/axial.gin"]:  # whose scopes set the axis
        built = build(override, sources=[IMAGES, *sources], root="ImageClassifier")
    else:
        built = build(override, sources=sources)
    with pytest.raises(UserError, match=message):
        config.check_read([override], built)


@pytest.mark.parametrize(
    ("sources", "override"),
    [
        ([BASE, LOCAL], "LocalAttention.window=16"),
        ([BASE, LOCAL], "nn.LocalAttention.sinks=2"),
        ([BASE, LOCAL], "WINDOW=16"),
        ([BASE], "models.LanguageModel.depth=3"),
        (["experiments/recall/mqar.gin"], "HEADS=2"),
    ],
)
def test_what_is_read_is_not(sources, override):
    config.check_read([override], build(override, sources=sources))
    # Enough that one of several objects reads it.
    config.check_read([override], build(override, sources=sources), build(override, sources=sources))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local", "no file local; did you mean 'experiments/mixers/local.gin'"),
        ("quickstart", "mean 'experiments/lm/quickstart.gin' or 'experiments/sweeps/quickstart.gin'"),
        ("folder", r"folder is a folder; give a \.gin file, such as folder/one\.gin"),
        ("config.yaml", r"config\.yaml is no \.gin file"),
        ("circle.gin", "files include one another in a circle"),
        ("bytes.gin", "config: "),
        ("x" * 5000, "no file xxxx"),
    ],
)
@pytest.mark.long
def test_what_is_no_config_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.gin").write_text("")
    (tmp_path / "config.yaml").write_text("steps: 3")
    (tmp_path / "circle.gin").write_text("include 'circle.gin'")
    (tmp_path / "bytes.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=message) as raised:
        build(sources=[name])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_what_has_no_default_is_named(tmp_path):
    imports = "from __gin__ import dynamic_registration\nfrom attnlab import ablate\n"
    (tmp_path / "sweep.gin").write_text(f"{imports}ablate.Ablation.question = '?'\nablate.Ablation.baseline = 'a'\n")
    with pytest.raises(UserError, match=r"config: Ablation\.arms and Ablation\.seeds: nothing sets it"):
        build(sources=[str(tmp_path / "sweep.gin")], root="Ablation")
    with pytest.raises(UserError, match=r"text_files\.path: nothing sets it"):
        build("LanguageTask.corpus=@text_files()", root="Experiment")


MARK = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').write_text('')\n"


def test_modules_beside_a_config_and_in_the_current_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    mixer = "from attnlab import nn\nclass Mine(nn.SoftmaxAttention):\n    pass\n"
    for module, folder in (("beside_it", "configs"), ("right_here", ".")):
        (tmp_path / folder / f"{module}.py").write_text(mixer)
        imports = f"from __gin__ import dynamic_registration\nimport {module}\n"
        (tmp_path / "configs" / f"{module}.gin").write_text(f"{imports}MIXERS = [@{module}.Mine]\n")
        built = build(sources=[BASE, f"configs/{module}.gin"])
        assert type(built.value.layers[0].mixer).__module__ == module
    (tmp_path / "lost.gin").write_text("import nowhere_to_be_found\n")
    with pytest.raises(UserError, match="no module nowhere_to_be_found; looked for beside the config, in the current"):
        build(sources=[BASE, "lost.gin"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("import side_effect", "imports side_effect, which is not attnlab's"),
        ("import side_effect as nn", "imports side_effect, which"),
        ("import os\nA = @os.system()\nos.system.command = 'touch side_effect.ran'", "imports os, which"),
        ("from attnlab.ablate import runs\nA = @runs.os.getcwd()", "imports attnlab.ablate.runs, which"),
        ("from attnlab import cli\nA = @cli.main()", "names cli.main, which"),
        ("from attnlab import ablate\nA = @ablate.runs.os.getcwd()", "names ablate.runs.os.getcwd, which"),
        ("from attnlab import train\nA = @train.train()", "names train.train, which"),
        ("from attnlab import train\ntrain.loop.Path.x = 3", "names train.loop.Path, which"),
        ("from attnlab import train\ntrain.train:\n    workdir = 'side_effect.ran'", "names train.train, which"),
        ("import attnlab.cli\nA = [1, (@attnlab.cli.main(),)]", "names attnlab.cli.main, which"),
        ("include 'inner.gin'", "imports side_effect, which"),
    ],
)
def test_a_config_that_is_not_trusted_runs_nothing(lines, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "side_effect", raising=False)
    (tmp_path / "side_effect.py").write_text(MARK)
    (tmp_path / "inner.gin").write_text("import side_effect\n")
    (tmp_path / "theirs.gin").write_text(f"from __gin__ import dynamic_registration\n{lines}\ninclude '{BASE}'\n")
    with pytest.raises(UserError, match=message):
        config.build(["theirs.gin"], root="LanguageModel", trusts=False)
    with pytest.raises(UserError, match=message):
        config.named(["theirs.gin"], trusts=False)
    assert not (tmp_path / "side_effect.ran").exists()


@pytest.mark.parametrize("path", [BASE, "experiments/recall/mqar.gin", IMAGES, "experiments/image/digits_axial.gin"])
@pytest.mark.long
def test_a_resolved_config_of_attnlab_alone_needs_no_trust(path, tmp_path):
    built = build(sources=[path], root="Experiment")
    (tmp_path / "config.gin").write_text(built.text)
    again = config.build([str(tmp_path / "config.gin")], root="Experiment", trusts=False)
    assert again.values == built.values
