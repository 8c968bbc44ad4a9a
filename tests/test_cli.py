"""The command line, as a user meets it: what each command leaves behind, and one clear line for each mistake."""

import io
import json
import math
import re
import signal
import subprocess
import sys
import time
import urllib.request

import jax
import pytest

from attnlab import __version__, cli, config, errors
from attnlab.ablate import speed
from attnlab.bench import lengths
from attnlab.regress import regression
from attnlab.train.mesh import on_devices
from attnlab.train.tasks import language

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
ARMS = "{'softmax': 'experiments/mixers/softmax.gin', 'local': ['experiments/mixers/local.gin', 'WINDOW = 8']}"
TINY_SWEEP = ["ablate", SWEEP, f"--gin.Ablation.arms={ARMS}", "--gin.Ablation.seeds=[0, 1]", *TINY]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A whole ablation, tiny."""
    workdir = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speed, "_MOST_SECONDS", math.inf)  # however busy the machine is, speed is measured
        assert cli.main([*TINY_SWEEP, "--workdir", str(workdir)]) == 0
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def test_ablate_runs_every_arm_with_every_seed(swept):
    got = rows(swept)
    arms = {"softmax", "local"}
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


@pytest.mark.long
def test_ablate_again_runs_nothing_and_reports_the_same(swept, capsys):
    before, report = rows(swept), (swept / "report.html").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in (swept / "runs").rglob("metrics.jsonl")}
    assert cli.main([*TINY_SWEEP, "--workdir", str(swept)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(", trained before\n") == len(before)
    assert "training\n" not in printed
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
    assert re.search(r"time: steps \S+ s, data \S+ s, .*compilation \S+ s; [\d,]+ tokens per second\n", first)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first.replace("validation: ", "trained before; validation: ")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["abalte", SWEEP], "; did you mean 'ablate'?"),
        (["train", LM, "--steps", "5"], "; an option of a config is --gin.NAME=VALUE"),
    ],
)
def test_a_word_that_no_command_knows_has_a_hint(arguments, hint, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(arguments)
    assert capsys.readouterr().err.endswith(f"{hint}\n")


# Options of a sample, and what is said of them.
PROMPTED = {
    "--prompt ": "prompt: got a text of no tokens",
    f"--prompt {32 * 'x'}": "prompt: got 32 tokens, and it was trained on sequences of 32; say with --length",
    "--length 0": "length: got 0 after a prompt of 8 tokens; need 1 to 1048576",
    "--top-k 0": "top_k: got 0; need at least 1",
    "--top-p 1.5": "top_p: got 1.5; need a number above 0 and at most 1",
    "--top-p nan": "top_p: got nan",
    "--stop ": "stop: got an empty text",
}


@pytest.mark.long
def test_sample_continues_the_text_of_a_run(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "texts.txt"
    assert cli.main(["train", LM, "--workdir", str(run), *TINY]) == 0
    capsys.readouterr()
    assert cli.main(["sample", str(run), "--count", "2", "--seed", "4"]) == 0
    text = capsys.readouterr().out
    assert text.count("--- after '") + text.count('--- after "') == 2
    assert cli.main(["sample", str(run), "--count", "2", "--seed", "4", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_text() == text
    draws = ["--length", "5", "--top-k", "40", "--top-p", "0.95", "--seed", "4"]
    assert cli.main(["sample", str(run), "--prompt", "def ", "--prompt", "naïve", *draws]) == 0
    told = capsys.readouterr()
    first, second = told.out.split("\n\n--- after 'naïve'\n")
    assert first.startswith("--- after 'def '\n")
    assert second.endswith("\n")
    assert re.search(r"\d+ tokens per second\n$", told.err)
    # The first as if it were alone, and no further than to what ends it.
    assert cli.main(["sample", str(run), "--prompt", "def ", *draws, "--stop", first[len("--- after 'def '\n")]]) == 0
    assert capsys.readouterr().out == first[: len("--- after 'def '\n") + 1] + "\n"
    for option, message in PROMPTED.items():
        assert cli.main(["sample", str(run), *option.split(" ")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow  # it trains a model on four devices
def test_sample_lays_the_model_over_the_devices_of_its_mesh_and_draws_what_one_draws(tmp_path, capsys, monkeypatch):
    seen = []

    def noting(model, *arguments, **options):
        shards = model.embedding.get_value().addressable_shards
        seen.append((jax.sharding.get_abstract_mesh().size, [shard.data.shape for shard in shards]))
        return stream(model, *arguments, **options)

    stream = language.stream
    monkeypatch.setattr(language, "stream", noting)
    run = str(tmp_path / "run")
    mesh = ["experiments/meshes/data.gin", "--gin.Mesh.data=2", "--gin.Mesh.tensor=2"]
    assert cli.main(["train", LM, *mesh, "--workdir", run, *TINY]) == 0
    capsys.readouterr()
    for options in (["--count", "3"], ["--prompt", "def ", "--prompt", "naïve", "--length", "9"]):
        assert cli.main(["sample", run, *options]) == 0
        of_four = capsys.readouterr()
        assert "\nsampling on 4 devices, data 2 x tensor 2\n" in of_four.err
        with on_devices(jax.devices()[:1]):
            assert cli.main(["sample", run, *options]) == 0
            of_one = capsys.readouterr()
        assert "sampling on" not in of_one.err
        assert seen[-2:] == [(4, 4 * [(128, 16)]), (0, [(256, 16)])]
        assert of_one.out == of_four.out
    assert cli.main(["sample", run, "--gin.Mesh.tensor=16"]) == 2
    assert "mesh: got data 2 x tensor 16, and there are 8 devices" in capsys.readouterr().err


@pytest.mark.slow  # the fast tests hold it of the task, in train/tasks/test_pixel_tasks.py
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
    assert (printed.out, printed.err.splitlines()[-1]) == (f"wrote {out}\n", "step 2 of 2")
    assert out.stat().st_size > 1000


def test_list_names_mixers_tasks_and_configs(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("LocalAttention", "LinearAttention", "LanguageTask", SWEEP, LM):
        assert name in out


@pytest.mark.parametrize(("columns", "starts"), [(80, "      The last"), (120, f"  {LM:<41} The last")])
def test_a_row_of_list_is_wrapped_on_a_terminal_and_whole_elsewhere(columns, starts, capsys, monkeypatch):
    text = "The last of many words " * 8 + "end."
    cli._print_row(LM, 41, text)
    assert capsys.readouterr().out == f"  {LM:<41} {text}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    cli._print_row(LM, 41, text)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(" ".join(lines).split()) == f"{LM} {text}"
    assert sum(line.startswith(starts) for line in lines) == 1
    assert max(map(len, lines)) <= columns


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


def dangling_link(path):
    (path / "link").symlink_to(path / "nothing")
    return ["train", LM, "--workdir", str(path / "link"), *TINY]


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


def image_run(path):
    (path / "config.gin").write_text("include 'experiments/image/digits_axial.gin'\n")
    return path


def mute_run(path):
    files = f"include '{LM}'\ninclude 'experiments/mixers/routing.gin'\n"
    imported = "from __gin__ import dynamic_registration\nfrom attnlab import nn\n"
    (path / "config.gin").write_text(f"{imported}{files}nn.RoutingAttention.membership = 'global'\n")
    return ["sample", str(path)]


def of_another_s_run(path):
    (path / "config.gin").write_text(f"include '{LM}'\nimport this_would_run\n")
    return path


def no_seeds(path):
    text = config.find(SWEEP).read_text()
    (path / "sweep.gin").write_text("\n".join(line for line in text.splitlines() if ".seeds" not in line))
    return ["ablate", str(path / "sweep.gin"), "--dry-run"]


def misspelt_include(path):
    (path / "mine.gin").write_text("include 'experiments/lm/quikstart.gin'\n")
    return ["train", str(path / "mine.gin")]


def misspelt_file(path):
    (path / "mine.gin").write_text("")
    return ["train", str(path / "mien.gin")]


def a_folder(path):
    (path / "here").mkdir()
    return ["train", str(path / "here")]


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
    "a link to nothing": (dangling_link, "is a link to nothing; give another --workdir"),
    "a name that is no text": (lambda path: ["train", LM, "--workdir", str(path / "a\udcff")], "need a name in UTF-8"),
    "a sweep's name that is no text": (
        lambda path: ["ablate", SWEEP, "--workdir", str(path / "a\udcff")],
        "need a name in UTF-8",
    ),
    "unwritable cache": (folder_in_the_way, "cannot write to"),
    "no processes": (lambda path: ["ablate", SWEEP, "--processes", "0"], "processes: got 0; need at least 1"),
    "another run's workdir": (other_run, "holds a run with"),
    "another kind of store": (
        lambda path: ["train", LM, "--workdir", "s3://bucket/run"],
        "workdir: got s3://bucket/run; need a folder, or gs://BUCKET/...",
    ),
    "no bucket": (lambda path: ["train", LM, "--workdir", "gs://"], "workdir: got gs://; need a folder, or gs://B"),
    **{
        f"processes: {options}": (lambda path, options=options: ["train", LM, *options.split()], message)
        for options, message in {
            "--coordinator h:1 --processes 2": "process: need it with --coordinator",
            "--process 1": "coordinator: need it with --process",
            "--distributed --process 1": "process: got 1 with --distributed",
            "--coordinator h --processes 2 --process 0": "coordinator: got 'h'; need HOST:PORT",
            "--coordinator h:99999 --processes 2 --process 0": "coordinator: got 'h:99999'; need HOST:PORT",
            "--coordinator h:1 --processes 0 --process 0": "processes: got 0; need 1 to 65536",
            "--coordinator h:1 --processes 2 --process 2": "process: got 2; need 0 to 1",
            "--heartbeat 5": "heartbeat: got 5 for a single process",
            "--distributed --heartbeat 0": "heartbeat: got 0; need 1 to 86400 seconds",
        }.items()
    },
    **{
        f"processes of a sweep: {options}": (lambda path, options=options: ["ablate", SWEEP, *options.split()], message)
        for options, message in {
            "--coordinator h:1 --processes 2": "process: need it with --coordinator",
            "--processes 2 --process 1": "coordinator: need it with --processes",
            "--distributed --processes 2": "processes: got 2 with --distributed",
            "--processes 2 --heartbeat 5": "heartbeat: got 5 for a single process",
            "--distributed --dry-run": "dry_run: got it with --distributed or --coordinator; one process alone lists",
        }.items()
    },
    "no sweep": (lambda path: ["ablate", LM], "configures no Ablation"),
    "a mixer's name": (lambda path: ["show", "local"], "did you mean 'experiments/mixers/local.gin'?"),
    "a file beside it": (misspelt_file, "mine.gin'?"),
    "a file that it includes": (misspelt_include, "experiments/lm/quikstart.gin; did you mean 'experiments/lm/quickst"),
    "a macro of another file": (
        lambda path: ["train", LM, "--gin.WINDOW=8"],
        "macro WINDOW is set but nothing uses it; used by allmem.gin, based.gin, ",
    ),
    "a folder": (a_folder, "is a folder; give a .gin file"),
    "a sweep to train": (lambda path: ["train", SWEEP], "is a sweep of several runs; `attnlab ablate` runs it"),
    "a sweep to show": (lambda path: ["show", SWEEP], "is a sweep; give the files of one of its arms"),
    "no seeds": (no_seeds, "Ablation.seeds: nothing sets it"),
    "warm-up to the end": (lambda path: ["train", LM, "--gin.STEPS=20"], "warmup_steps: got 20; need fewer than steps"),
    "a word for a rate": (
        lambda path: ["train", LM, "--gin.OptimizerOptions.learning_rate=fast"],
        "learning_rate: got 'fast'; need a number",
    ),
    "an option of another mixer": (lambda path: ["train", LM, "--gin.LocalAttention.window=8"], "that is built reads"),
    "an option of no arm": (
        lambda path: ["ablate", SWEEP, "--dry-run", "--gin.RoutingAttention.window=8"],
        "RoutingAttention.window: nothing that is built reads it; did you mean 'LocalAttention.window'?",
    ),
    "the sweep's own seed": (
        lambda path: ["ablate", SWEEP, "--dry-run", "--gin.Experiment.seed=8"],
        "the sweep sets it itself, from Ablation.seeds",
    ),
    "options of list": (lambda path: ["list", "--gin.STEPS=3"], "list reads no config, so it takes no --gin.STEPS=3"),
    "options of report": (lambda path: ["report", str(path), "--gin.STEPS=3"], "report reads no config"),
    "options of bench": (lambda path: ["bench", "--gin.STEPS=3"], "bench reads no config"),
    "options of regress": (lambda path: ["regress", "--gin.STEPS=3"], "regress reads no config"),
    "a metric's typo": (
        lambda path: ["ablate", SWEEP, "--dry-run", "--gin.Ablation.metric=acuracy"],
        "metric: got 'acuracy'; softmax has accuracy, loss, bits_per_byte; did you mean 'accuracy'?",
    ),
    "a match's typo": (
        lambda path: ["ablate", SWEEP, "--gin.Ablation.match=paramters", "--gin.Ablation.knobs=WINDOW"],
        "match: got 'paramters'; need one of parameters, flops, state_size",
    ),
    "a knob's typo": (
        lambda path: ["ablate", SWEEP, "--gin.Ablation.match=flops", "--gin.Ablation.knobs=LanguageModel.mlp_hiden"],
        "LanguageModel has no option 'mlp_hiden'; did you mean 'mlp_hidden'?",
    ),
    "a sample of code": (lambda path: ["sample", str(of_another_s_run(path))], "imports this_would_run, which is not"),
    "a picture of code": (lambda path: ["show", str(of_another_s_run(path) / "config.gin")], "give --trust"),
    "a prompt for images": (
        lambda path: ["sample", str(image_run(path)), "--prompt", "x"],
        "prompt: got ['x']; it is for texts, and this run draws images",
    ),
    "a warm sample": (lambda path: ["sample", str(path), "--temperature", "inf"], "temperature: got inf"),
    "a sample's seed": (lambda path: ["sample", str(path), "--seed", "-1"], "seed: got -1; need 0 to 2147483647"),
    "no picture": (lambda path: ["show", LM, "--out", str(path / "x.doc")], "need a picture, .png, .svg, .pdf"),
    "a picture of pairs": (lambda path: ["show", LM, "--length", "99999"], "length: got 99999; need 1 to 2048"),
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


@pytest.mark.parametrize("command", ["bench", "regress"])
def test_a_folder_for_figures_is_looked_at_before_anything_is_measured(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lengths, "time_lengths", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(regression, "write", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert cli.main([command, "--workdir", str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"attnlab: workdir: cannot write to .*\.png \(.*\); give another\n", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["train", LM, "--workdir", ""], ["report", " "], ["bench", "--workdir", ""]])
def test_an_empty_path_is_not_the_current_folder(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "got an empty path" in capsys.readouterr().err


def test_an_object_store_is_for_runs_alone(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--workdir", "gs://bucket/run"])
    assert "got gs://bucket/run; need a path of this machine (train, ablate, " in capsys.readouterr().err


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", LM, "--gn.STEPS=3"])
    assert "--gn.STEPS=3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("LanguageModel.features=10000000", "features: got 10000000; a model of"),
        ("LanguageModel.vocabulary=1000000000000", "vocabulary: got 1000000000000; a model of"),
        ("LanguageModel.depth=100000", "depth: got 100000; need 1 to 256"),
        ("Experiment.batch_size=1000000000", "batch_size: got 1000000000; a batch of"),
        ("LanguageTask.sequence_length=1000000000", "sequence_length: got 1000000000; the train text"),
        ("Experiment.seed=-1", "seed: got -1"),
        ("Experiment.seed=1000000000000000000000000000000", "seed: got 1000000000000000000000000000000"),
    ],
)
def test_sizes_that_no_machine_has_are_refused_at_once(option, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    assert cli.main(["train", LM, f"--gin.{option}"]) == 2
    assert time.process_time() - start < 5
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.rglob("*")) == []  # so the right command finds its folder free


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"attnlab {__version__}\n"


def test_a_command_says_that_it_starts_before_anything_slow():
    program = "import sys; sys.argv[1:] = ['list', '--gin.X=1']\nfrom attnlab.cli import main\n"
    program += "status = main(); assert 'jax' not in sys.modules; sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first == f"attnlab {__version__}: starting"
    assert second.startswith("attnlab: list reads no config")


@pytest.mark.long
def test_the_primitives_are_imported_when_one_is_asked_for():
    program = (
        "import sys, attnlab; assert 'jax' not in sys.modules; attnlab.__version__; assert 'jax' not in sys.modules\n"
        "from attnlab import local_attention, masks, attention, nn\n"
        "assert attnlab.local_attention is local_attention is attention.local_attention\n"
        "names = {}; exec('from attnlab import *', names); assert names['masks'] is masks\n"
        "assert 'explain' in dir(attnlab) and not hasattr(attnlab, 'nowhere') and not hasattr(attnlab, '__path')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


ADVICE = {
    "an index": (None, "pip install 'attnlab[experiments]'"),
    "a checkout that is edited": (
        {"url": "file:///home/me/attnlab", "dir_info": {"editable": True}},
        "pip install -e '/home/me/attnlab[experiments]'",
    ),
    "a folder": (
        {"url": "file:///home/me/attnlab", "dir_info": {}},
        "pip install 'attnlab[experiments] @ file:///home/me/attnlab'",
    ),
    "a wheel": (
        {"url": "file:///tmp/attnlab-0.1.0-py3-none-any.whl", "archive_info": {}},
        "pip install 'attnlab[experiments] @ file:///tmp/attnlab-0.1.0-py3-none-any.whl'",
    ),
    "a repository": (
        {"url": "https://host/attnlab.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
        "pip install 'attnlab[experiments] @ git+https://host/attnlab.git@abc'",
    ),
}


@pytest.mark.parametrize("source", ADVICE)
def test_a_missing_package_comes_from_where_attnlab_came_from(source, monkeypatch, capsys):
    recorded, advice = ADVICE[source]

    class Distribution:
        def read_text(self, name):
            return None if recorded is None else json.dumps(recorded)

    def absent(command, overrides):
        raise ModuleNotFoundError("No module named 'optax'", name="optax")

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution())
    monkeypatch.setattr(cli, "_list", absent)
    assert cli.main(["list"]) == 2
    assert capsys.readouterr().err == f"attnlab: this needs optax: {advice}\n"
    with_extra = advice.replace("[experiments]", "[experiments,tokenizers]")
    assert errors.missing_package("tokenizers.models") == f"this needs tokenizers.models: {with_extra}"


MINE = """import attnlab.attention as attention
from attnlab import nn
from attnlab.nn.mixers.base import flat

class Mine(nn.Attention):
    def mix(self, query, key, value, x, segment_ids):
        out = attention.dot_product_attention(flat(query), flat(key), flat(value), is_causal=self.is_causal)
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def mechanism_flops(self, space):
        return 0
"""


@pytest.mark.long
def test_a_mixer_of_ones_own_without_a_cache_trains_and_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixers").mkdir()
    (tmp_path / "mixers" / "of_my_own.py").write_text(MINE)
    imports = "from __gin__ import dynamic_registration\nimport of_my_own\n"
    (tmp_path / "mixers" / "mine.gin").write_text(f"{imports}MIXERS = [@of_my_own.Mine]\n")
    arms = "--gin.Ablation.arms={'softmax': 'experiments/mixers/softmax.gin', 'mine': 'mixers/mine.gin'}"
    sweep = ["ablate", SWEEP, arms, "--gin.Ablation.seeds=[0]", "--workdir", "out", *TINY]
    assert cli.main([*sweep, "--dry-run"]) == 0
    assert "| mine-seed0 | 0.003 |" in capsys.readouterr().out
    assert cli.main(sweep) == 0
    capsys.readouterr()
    assert {row["arm"]: row["status"] for row in rows(tmp_path / "out")} == {"softmax": "finished", "mine": "finished"}
    assert [row["state_size"] is None for row in rows(tmp_path / "out")] == [False, True]
    (run,) = (tmp_path / "out" / "runs").glob("mine-*")
    refusal = "Mine: it has no cache to decode from"
    assert (run / "samples.txt").read_text() == f"(nothing: {refusal})"
    assert cli.main(["sample", str(run)]) == 2
    assert "imports of_my_own, which is not attnlab's" in capsys.readouterr().err
    assert cli.main(["sample", str(run), "--trust"]) == 2
    assert refusal in capsys.readouterr().err
    assert cli.main(["show", "mixers/mine.gin", "--length", "16", "--out", "pictures/mine.png"]) == 0
    assert (tmp_path / "pictures" / "mine.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_mixer_of_ones_own_that_fails_in_decoding_is_one_line(tmp_path, capsys, monkeypatch):
    """With its place; the run itself ends well, and says why it has no samples."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "fails_late.py"
    cached = "    def init_mechanism_cache(self, batch, max_length):\n        return ()\n\n"
    step = "    def mechanism_step(self, cache, query, key, value, x):\n        return {}['nothing']\n"
    module.write_text(f"{MINE.rstrip()}\n\n{cached}{step}")
    imports = "from __gin__ import dynamic_registration\nimport fails_late\n"
    (tmp_path / "late.gin").write_text(f"{imports}MIXERS = [@fails_late.Mine]\n")
    assert cli.main(["train", LM, "late.gin", "--workdir", "run", *TINY]) == 0
    capsys.readouterr()
    assert cli.main(["sample", "run", "--trust"]) == 1
    line = len(module.read_text().splitlines())
    assert capsys.readouterr().err.splitlines()[-1] == f"attnlab: KeyError: 'nothing', at {module}:{line}"


@pytest.mark.long
def test_samples_go_into_a_folder_that_is_made_or_named(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "new" / "folder" / "texts.txt"
    assert cli.main(["train", LM, "--workdir", str(run), *TINY]) == 0
    assert cli.main(["sample", str(run), "--out", str(out)]) == 0
    assert out.read_text().startswith("--- after ")
    capsys.readouterr()
    for wrong in (out.parent, out / "below a file.txt"):
        assert cli.main(["sample", str(run), "--out", str(wrong)]) == 2
        assert re.fullmatch(r"attnlab: out: cannot write to .* \(.*\); give another\n", capsys.readouterr().err)


def test_a_thread_that_a_library_left_behind_is_not_waited_for():
    """As orbax can leave one after what it could not write."""
    program = (
        "import sys, threading; threading.Thread(target=threading.Event().wait).start()\n"
        "from attnlab import cli; sys.argv = ['attnlab', 'list', '--gin.X=1']; cli.run()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "list reads no config" in done.stderr


@pytest.mark.long
def test_a_new_sweep_is_one_that_would_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "sweeps/mine.gin"]) == 0
    assert cli.main(["ablate", "sweeps/mine.gin", "--dry-run"]) == 0
    assert "9 of 9 runs to do" in capsys.readouterr().out
    commented = (tmp_path / "sweeps" / "mine.gin").read_text()
    options = re.findall(r"^# (ablate\.Ablation\.\w+ = .*)$", commented, re.MULTILINE)
    assert len(options) == 6
    (tmp_path / "all.gin").write_text("\n".join([commented, *options[2:]]) + "\n")  # a loss, in place of an accuracy
    assert cli.main(["ablate", "all.gin", "--dry-run"]) == 0
    capsys.readouterr()
    for arguments, message in (
        (["sweeps/mine.gin"], "new: sweeps/mine.gin exists already; give another name"),
        (["mine.txt"], "new: got mine.txt; need a name that ends in .gin"),
        (["other.gin", "--arms", "experiments/mixers/local.gin"], "arms: got experiments/mixers/local.gin; need two"),
        (["other.gin", "--base", "experiments/lm/quick.gin"], "config: no file experiments/lm/quick.gin"),
    ):
        assert cli.main(["new", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other.gin").exists()


def test_a_report_is_opened_or_served(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    assert cli.main(["open", str(tmp_path)]) == 2
    assert "has no report.html; give the folder of an ablation that has run" in capsys.readouterr().err
    (tmp_path / "report.html").write_text("a report")
    assert cli.main(["open", str(tmp_path)]) == 0
    assert opened == [(tmp_path / "report.html").as_uri()]
    assert cli.main(["open", str(tmp_path), "--port", "70000"]) == 2
    command = [sys.executable, "-m", "attnlab.cli", "open", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        address = program.stdout.readline().strip()
        with urllib.request.urlopen(address, timeout=60) as page:
            assert page.read() == b"a report"
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130


def test_debug_prints_where_an_error_came_from(capsys):
    assert cli.main(["train", "nowhere.gin"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["train", "nowhere.gin", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("attnlab: config: no file nowhere.gin")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shells_complete_commands_and_their_options(shell, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert "ablate" in script
    assert "--dry-run" in script if shell != "tcsh" else "dry-run" in script


def test_colors_are_for_terminals_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert cli._in_color("attnlab:", 31, Terminal()) == "\033[31mattnlab:\033[0m"
    assert cli._in_color("attnlab:", 31, io.StringIO()) == "attnlab:"
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli._in_color("attnlab:", 31, Terminal()) == "attnlab:"
