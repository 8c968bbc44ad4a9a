"""The command line, as a user meets it: what each command leaves behind, and one clear line for each mistake."""

import json
import re
import subprocess
import sys

import pytest

from attnlab import cli

TINY = [
    "--gin.STEPS=4",
    "--gin.OptimizerOptions.warmup_steps=2",
    "--gin.LanguageModel.features=16",
    "--gin.LanguageModel.depth=1",
    "--gin.LanguageTask.sequence_length=32",
    "--gin.Experiment.batch_size=2",
    "--gin.Experiment.log_every=2",
    "--gin.Experiment.evaluate_every=2",
    "--gin.Experiment.evaluation_batches=1",
]
LM = "experiments/lm/quickstart.gin"
SWEEP = "experiments/sweeps/quickstart.gin"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A whole ablation, tiny."""
    workdir = tmp_path_factory.mktemp("swept")
    assert cli.main(["ablate", SWEEP, "--workdir", str(workdir), *TINY]) == 0
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def test_ablate_runs_every_arm_with_every_seed(swept):
    got = rows(swept)
    arms = {"softmax", "local", "gated_linear"}
    assert {(row["arm"], row["seed"]) for row in got} == {(arm, seed) for arm in arms for seed in (0, 1)}
    for row in got:
        assert row["status"] == "finished"
        assert row["final"]["loss"] < 6
        assert row["implementations"]
        assert row["environment"]["jax"]
        assert row["task"]["sha256"]
        assert "models.LanguageModel.features = 16" in row["config"]
        assert row["run"].startswith(f"{row['arm']}-seed{row['seed']}-")
        assert (swept / "runs" / row["run"] / "config.gin").read_text() == row["config"]


def test_ablate_again_runs_nothing_and_reports_the_same(swept):
    before, report = rows(swept), (swept / "report.html").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in (swept / "runs").rglob("metrics.jsonl")}
    assert cli.main(["ablate", SWEEP, "--workdir", str(swept), *TINY]) == 0
    assert rows(swept) == before
    assert (swept / "report.html").read_text() == report
    assert {path: path.stat().st_mtime_ns for path in (swept / "runs").rglob("metrics.jsonl")} == stamps


def test_report_is_one_page_that_needs_nothing_else(swept, capsys):
    page = (swept / "report.html").read_text()
    assert page.count('<div role="img"') == 8
    assert page.count("layer 0: LocalAttention") == 1
    assert "Each text continues this beginning" in page
    assert not re.search(r"(src|href)\s*=\s*\W?http|@import|url\(http", page)
    (swept / "report.html").unlink()
    assert cli.main(["report", str(swept)]) == 0
    assert str(swept / "report.html") in capsys.readouterr().out
    assert (swept / "report.html").read_text() == page
    table = (swept / "results.md").read_text()
    assert table.count("| softmax |") == 3
    assert "attnlab ablate experiments/sweeps/quickstart.gin" in table


def test_train_continues_where_it_stopped(tmp_path, capsys):
    command = ["train", LM, "experiments/mixers/local.gin", "--workdir", str(tmp_path), *TINY]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "validation: " in first
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first


def test_sample_continues_the_text_of_a_run(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "texts.txt"
    assert cli.main(["train", LM, "--workdir", str(run), *TINY]) == 0
    capsys.readouterr()
    assert cli.main(["sample", str(run), "--count", "2", "--seed", "4"]) == 0
    text = capsys.readouterr().out
    assert text.count("--- after '") + text.count('--- after "') == 2
    assert cli.main(["sample", str(run), "--count", "2", "--seed", "4", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text() == text


def test_a_run_on_images_leaves_a_picture_and_sample_draws_others(tmp_path, capsys):
    tiny = ["AxialTransformer.features=8", "AxialTransformer.inner_layers=1", "STEPS=2", "Experiment.batch_size=4"]
    options = [f"--gin.{option}" for option in (*tiny, "OptimizerOptions.warmup_steps=1")]
    train = ["train", "experiments/image/digits_axial.gin", "--gin.Experiment.evaluation_batches=1", *options]
    run, out = tmp_path / "run", tmp_path / "cold.png"
    assert cli.main([*train, "--workdir", str(run)]) == 0
    assert (run / "samples.png").stat().st_size > 1000
    capsys.readouterr()
    assert cli.main(["sample", str(run), "--count", "3", "--temperature", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err.splitlines()[-1]) == (f"{out}\n", "step 2 of 2")
    assert out.stat().st_size > 1000


def test_list_names_mixers_tasks_and_configs(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("LocalAttention", "LinearAttention", "LanguageTask", SWEEP, LM):
        assert name in out


def test_help_needs_no_jax_and_names_every_command():
    program = "import sys; from attnlab import cli; cli.main([]); assert 'flax' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    for command in ("train", "sample", "ablate", "report", "list", "--gin.NAME=VALUE"):
        assert command in out


def file_in_the_way(path):
    (path / "file").write_text("")
    return ["train", LM, "--workdir", str(path / "file" / "run"), *TINY]


def folder_in_the_way(path):
    (path / "file").write_text("")
    return ["ablate", SWEEP, "--workdir", str(path / "out"), "--cache", str(path / "file" / "runs"), *TINY]


def other_run(path):
    (path / "run.json").write_text(json.dumps({"LanguageModel.depth": "7"}))
    return ["train", LM, "--workdir", str(path), *TINY]


def broken_results(path):
    (path / "results.jsonl").write_text('{"arm": ')
    return ["report", str(path)]


def classifier_run(path):
    built = "experiments/image/digits.gin"
    (path / "config.gin").write_text(f"include '{built}'\n")
    return ["sample", str(path)]


def mute_run(path):
    files = f"include '{LM}'\ninclude 'experiments/mixers/routing.gin'\n"
    imported = "from __gin__ import dynamic_registration\nfrom attnlab import nn\n"
    (path / "config.gin").write_text(f"{imported}{files}nn.RoutingAttention.membership = 'global'\n")
    return ["sample", str(path)]


def run_without_a_checkpoint(path):
    (path / "config.gin").write_text(f"include '{LM}'\n")
    return ["sample", str(path)]


MISTAKES = {
    "sample of no run": (lambda path: ["sample", str(path)], "has no config.gin"),
    "sample of what draws nothing": (classifier_run, "models of ImageClassificationTask draw nothing"),
    "sample of what does not decode": (mute_run, "cannot continue a text: membership: got 'global'"),
    "sample before a checkpoint": (run_without_a_checkpoint, "holds none; give the folder of a run"),
    "no samples": (lambda path: ["sample", str(path), "--count", "0"], "count: got 0"),
    "cold samples": (lambda path: ["sample", str(path), "--temperature", "-1"], "temperature: got -1"),
    "missing config": (lambda path: ["train", "nowhere.gin"], "no file nowhere.gin"),
    "misspelled config": (lambda path: ["train", "experiments/lm/quikstart.gin"], "did you mean"),
    "misspelled option": (lambda path: ["train", LM, "--gin.LanguageModel.dept=2"], "did you mean 'depth'"),
    "misspelled macro": (lambda path: ["train", LM, "--gin.STEP=2"], "macro STEP is set but nothing uses it"),
    "not a pair": (lambda path: ["train", LM, "--gin.STEPS"], "is not NAME=VALUE"),
    "heads that do not divide": (lambda path: ["train", LM, "--gin.SoftmaxAttention.num_heads=5"], "num_heads: got 5"),
    "window 0": (lambda path: ["train", LM, "experiments/mixers/local.gin", "--gin.WINDOW=0"], "window: got"),
    "too long": (lambda path: ["train", LM, "--gin.LanguageTask.sequence_length=999999999"], "sequence_length: got"),
    "missing text": (
        lambda path: ["train", LM, "--gin.LanguageTask.corpus=@text_files()", "--gin.text_files.path=/no/such/file"],
        "no file or folder /no/such/file",
    ),
    "unwritable workdir": (file_in_the_way, "cannot write to"),
    "unwritable cache": (folder_in_the_way, "cannot write to"),
    "no processes": (lambda path: ["ablate", SWEEP, "--processes", "0"], "processes: got 0; need at least 1"),
    "another run's workdir": (other_run, "holds a run with"),
    "no sweep": (lambda path: ["ablate", LM], "configures no Ablation"),
    "nothing to report": (lambda path: ["report", str(path)], "has no results.jsonl"),
    "broken results": (broken_results, "is not JSON lines"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_and_status_2(mistake, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = MISTAKES[mistake]
    arguments = make(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("attnlab: ")
    assert error.count("\n") == 1
    assert message in error
    assert all(path.exists() for path in before)


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", LM, "--gn.STEPS=3"])
    assert "--gn.STEPS=3" in capsys.readouterr().err
