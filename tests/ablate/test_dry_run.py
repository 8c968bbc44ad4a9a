"""The dry run: what would run and what it costs, and nothing happens."""

import re

import pytest
import tiny_sweep

from attnlab import cli
from attnlab.ablate import dry_run, run_ablation
from attnlab.ablate.plan import Plan

pytestmark = pytest.mark.usefixtures("pretended")


def cells(shown):
    """Rows of the table by run, and the line of totals."""
    table = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(table[0], line)) for line in table[2:]}, shown.splitlines()[-1]


def test_it_lists_and_adds_up_and_writes_nothing(tmp_path, capsys):
    file = tiny_sweep.write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["ablate", file, "--workdir", str(tmp_path / "out"), "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    rows, total = cells(capsys.readouterr().out)
    assert list(rows) == ["softmax-seed0", "local-seed0", "softmax-seed1", "local-seed1"]
    assert {row["state"] for row in rows.values()} == {"to run"}
    assert {row["tokens"] for row in rows.values()} == {str(4 * 4 * 16)}  # steps x batch x length
    costs = Plan(file, []).run("softmax", 0, None).costs
    assert rows["softmax-seed0"]["parameters"] == f"{costs['parameters']:,}"
    assert rows["softmax-seed0"]["training FLOPs"] == f"{3 * 256 * costs['flops']:.3g}"
    assert "time left" not in rows["softmax-seed0"]
    assert total.startswith("2 arms x 2 seeds x 4 steps: 4 of 4 runs to do: ")
    assert total.endswith("1,024 of 1,024 tokens")


@pytest.mark.long
def test_states_and_the_time_that_is_left(tmp_path):
    file = tiny_sweep.write(tmp_path)
    run_ablation(file, ["Ablation.seeds=[0]"], tmp_path / "out", report=lambda line: None)
    run = Plan(file, []).run("local", 1, None)
    (tmp_path / "out" / "runs" / f"local-seed1-{run.digest}" / "checkpoints" / "2").mkdir(parents=True)
    rows, total = cells(dry_run(file, [], tmp_path / "out" / "runs"))
    assert [row["state"] for row in rows.values()] == ["finished", "finished", "to run", "step 2 of 4"]
    assert [row["time left"] for row in rows.values()] == ["0 s", "0 s", "4 s", "2 s"]  # 256 tokens at 64 per second
    assert ": 2 of 4 runs to do: " in total
    assert total.endswith("384 of 1,024 tokens, 6 s of training one after the other")


@pytest.mark.slow
def test_rates_before_and_after_their_search(tmp_path):
    file = tiny_sweep.write(tmp_path, "ablate.Ablation.learning_rates = [1e-3, 1e-2, 10.0]")
    rows, total = cells(dry_run(file, [], tmp_path / "out" / "runs"))
    assert len(rows) == 10
    assert rows["local-seed1000-rate0.001"]["learning rate"] == "0.001"
    assert rows["local-seed1"]["learning rate"] == "the best"
    assert total.startswith("2 arms x (2 seeds + 3 learning rates) x 4 steps: 10 of 10 runs to do: ")
    run_ablation(file, ["Ablation.seeds=[0]"], tmp_path / "out", report=lambda line: None)
    rows, total = cells(dry_run(file, [], tmp_path / "out" / "runs"))
    assert [row["state"] for row in rows.values()] == ["finished", "finished", "failed"] * 2 + [
        *["finished"] * 2,
        *["to run"] * 2,
    ]
    assert rows["local-seed1-rate0.01"]["learning rate"] == "0.01"
    assert ": 2 of 10 runs to do: " in total


def test_equal_runs_count_once(tmp_path):
    arms = "{'softmax': 'experiments/mixers/softmax.gin', 'twin': ['experiments/mixers/softmax.gin', 'PAIRS = 2']}"
    rows, total = cells(dry_run(tiny_sweep.write(tmp_path, f"ablate.Ablation.arms = {arms}"), [], tmp_path / "runs"))
    assert rows["twin-seed0"]["state"] == "is softmax-seed0"
    assert ": 2 of 4 runs to do: " in total


LEAKING = """
from attnlab import nn

class Leaking(nn.Attention):
    def mix(self, query, key, value, x, segment_ids):
        return value[:, ::-1]

    def mechanism_flops(self, space):
        return 0
"""


def test_an_arm_that_sees_later_tokens_is_refused_already_here(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaking.py").write_text(LEAKING)
    (tmp_path / "leaking.gin").write_text(
        "from __gin__ import dynamic_registration\nimport leaking\nMIXERS = [@leaking.Leaking]\n"
    )
    arms = {"softmax": "experiments/mixers/softmax.gin", "mine": str(tmp_path / "leaking.gin")}
    file = tiny_sweep.write(tmp_path, f"ablate.Ablation.arms = {arms}")
    assert cli.main(["ablate", file, "--workdir", str(tmp_path / "out"), "--dry-run"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "Leaking is to be causal and sees later tokens" in line
    assert line.endswith("mend its mix (arm mine)")


def test_a_macro_of_an_arm_s_file_is_changed_in_the_arm(tmp_path, capsys):
    arms = {"softmax": "experiments/mixers/softmax.gin", "local": "experiments/mixers/local.gin"}
    file = tiny_sweep.write(tmp_path, f"ablate.Ablation.arms = {arms}")
    assert cli.main(["ablate", file, "--dry-run", "--gin.WINDOW=3"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--gin.WINDOW: arms set it themselves, local (experiments/mixers/local.gin); change it there" in line
    assert line.endswith(f"'WINDOW = 3' to an arm's list, in {file}")
    assert cli.main(["ablate", file, "--dry-run", "--gin.MIXERS=[]", "--gin.Ablation.seeds=[0.5]"]) == 2
    assert "seeds: got [0.5]" in capsys.readouterr().err  # of another override than what an arm's file sets


@pytest.mark.long
def test_a_sweep_says_how_much_it_is_and_after_each_run_about_how_long_the_rest_takes(tmp_path):
    file, lines = tiny_sweep.write(tmp_path), []
    run_ablation(file, ["Ablation.seeds=[0]"], tmp_path / "out", report=lines.append)
    assert lines[0].splitlines()[1] == f"2 arms x 1 seed x 4 steps: 2 runs in {tmp_path / 'out'}"
    assert [bool(re.search(r"; about \d+ s left$", line)) for line in lines if line[0] == "["] == [True, False]
    lines.clear()
    run_ablation(file, [], tmp_path / "out", report=lines.append)
    came = [line for line in lines if line[0] == "["]
    assert [line.rpartition(", ")[2].startswith("trained before") for line in came] == [True, True, False, False]
    assert ["left" in line for line in came] == [False, False, True, False]
