"""A run as files that need no trainer: what is loaded is what was trained, and what is damaged is said."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from attnlab import cli, config, export, nn
from attnlab.errors import UserError
from attnlab.train import restore_values

TINY = [
    "--gin.STEPS=2",
    "--gin.OptimizerOptions.warmup_steps=1",
    "--gin.LanguageModel.features=16",
    "--gin.LanguageModel.depth=1",
    "--gin.LanguageTask.sequence_length=16",
    "--gin.Experiment.batch_size=2",
    "--gin.Experiment.evaluation_batches=1",
]
TEXT = "the quick brown fox jumps over the lazy dog. " * 20
FACTS = {"format": "attnlab", "class": "LanguageModel"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the characters of a text, with buffers beside its parameters, and its exported folder."""
    path = tmp_path_factory.mktemp("exported")
    (path / "text.txt").write_text(TEXT)
    text = ["--gin.LanguageTask.corpus=@data.characters()", f"--gin.characters.path='{path / 'text.txt'}'"]
    configs = ["experiments/lm/quickstart.gin", "experiments/mixers/routing.gin"]
    assert cli.main(["train", *configs, *text, *TINY, "--workdir", str(path / "run")]) == 0
    assert cli.main(["export", str(path / "run")]) == 0
    return path / "run"


def test_what_is_loaded_is_what_was_trained(run):
    model = export.load(run / "export")
    experiment = config.build([str(run / "config.gin")], root="Experiment").value
    trained = nn.bind(experiment.model, restore_values(experiment, run))
    tokens = jnp.arange(24).reshape(2, 12) % 20
    got, want = (jax.jit(lambda tokens, model=each: model(tokens))(tokens) for each in (model, trained))
    np.testing.assert_array_equal(got, want)
    assert any("centroids" in name for name in load_file(run / "export" / "model.safetensors"))


def test_the_data_are_not_needed(run, tmp_path, monkeypatch):
    shutil.copytree(run / "export", tmp_path / "model")
    (run.parent / "text.txt").rename(run.parent / "gone.txt")
    try:
        assert export.load(tmp_path / "model").vocabulary == 256
    finally:
        (run.parent / "gone.txt").rename(run.parent / "text.txt")


def test_the_card_says_what_it_is_and_what_tokens_are(run):
    card = (run / "export" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: attnlab\n")
    assert "Tokens are characters, numbered as in vocabulary.json." in card
    assert "| Trained | 2 of 2 steps of 2 examples |" in card
    assert 'export.load("FOLDER")' in card
    assert "It needs attnlab with its extra experiments.\n" in card
    assert len({path.stat().st_mode for path in (run / "export").iterdir()}) == 1
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| Validation, loss | {last['loss']:.4g} |" in card
    known = json.loads((run / "export" / "vocabulary.json").read_text())
    assert known == {"unit": "character", "symbols": sorted(set(TEXT))}


def test_a_folder_that_holds_something_is_not_written_to(run, capsys):
    assert cli.main(["export", str(run)]) == 2
    assert "holds something already, maybe an earlier export; give a new folder with --out" in capsys.readouterr().err
    assert cli.main(["export", str(run / "checkpoints")]) == 2
    assert "has no config.gin; give the folder of a run" in capsys.readouterr().err


def without_a_value(folder, values):
    del values["norm.scale"]
    save_file(values, folder / "model.safetensors", FACTS)


def another_shape(folder, values):
    save_file({**values, "norm.scale": np.zeros(3, np.float32)}, folder / "model.safetensors", FACTS)


def one_more(folder, values):
    save_file({**values, "more": np.zeros(3, np.float32)}, folder / "model.safetensors", FACTS)


def of_another_library(folder, values):
    save_file(values, folder / "model.safetensors", {"format": "pt"})


def cut(folder, values):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-5])


def gone(folder, values):
    (folder / "model.safetensors").unlink()


def of_somebody_else(folder, values):
    path = folder / "config.gin"
    path.write_text("import this_would_run\n" + path.read_text())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_value, "has no norm.scale; the config's model needs"),
        (another_shape, "as norm.scale; the config's model needs"),
        (one_more, "has more, which the config's model has not"),
        (of_another_library, "is not from `attnlab export`"),
        (cut, "cannot read"),
        (gone, "has no model.safetensors"),
        (of_somebody_else, "imports this_would_run, which is not attnlab's"),
    ],
)
def test_what_is_damaged_is_said(damage, message, run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run / "export", folder)
    damage(folder, load_file(folder / "model.safetensors"))
    with pytest.raises(UserError, match=message):
        export.load(folder)


@pytest.mark.slow
def test_a_classifier_of_images(tmp_path):
    tiny = ["STEPS=2", "OptimizerOptions.warmup_steps=1", "Experiment.evaluation_batches=1"]
    options = [f"--gin.{option}" for option in tiny]
    run = tmp_path / "run"
    assert cli.main(["train", "experiments/image/digits.gin", *options, "--workdir", str(run)]) == 0
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    assert export.load(tmp_path / "model")(jnp.zeros((1, 8, 8, 1))).shape == (1, 10)
    assert "Tokens" not in (tmp_path / "model" / "README.md").read_text()
