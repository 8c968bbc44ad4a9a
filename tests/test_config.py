"""Configs: gin files wire objects, later sources win, and nothing misspelled passes."""

import math

import numpy as np
import pytest

from attnlab import config, models, nn
from attnlab.errors import UserError

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


def test_every_config_that_comes_along_builds_what_it_is_for(tmp_path):
    overrides = write_data(tmp_path)
    assert len(config.shipped()) >= 10
    for path in config.shipped():
        assert config.describe(path), f"{path} does not describe itself in its first line"
        kind = path.split("/")[1]
        if kind == "mixers":
            base, root = (IMAGES, "ImageClassifier") if path in FOR_IMAGES else (BASE, "LanguageModel")
            config.build([base, path], root=root)
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
        ([BASE], ["LanguageModel.depth=0"], r"depth: got 0; need at least 1 \(in LanguageModel\)"),
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
