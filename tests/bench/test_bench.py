"""The benchmarks of this machine: rows for every mechanism and length, a table, a plot, and exponents of the times."""

import inspect
import json
import math

import pytest

import attnlab
from attnlab import cli
from attnlab.bench import lengths, prompts


@pytest.mark.long
def test_bench_times_what_is_asked_for_and_keeps_it(tmp_path, capsys):
    command = ["bench", "--lengths", "512", "256", "--only", "local, causal", "--backward", "--workdir", str(tmp_path)]
    assert cli.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [(row["mechanism"], row["length"]) for row in rows] == [
        ("local, causal (window 256)", n) for n in (256, 512)
    ]
    assert all(row["seconds"] > 0 and row["temporary_bytes"] > 0 for row in rows)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert lengths.table(rows) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["block-sparse, an eighth", "block-sparse, causal, an eighth"])
def test_an_eighth_of_the_key_blocks_is_listed_at_every_length(name):
    for length in (1024, 8192):
        options = lengths.MECHANISMS[name].large(length)
        assert 8 * options["places"] * options["key_block"] == length


def test_a_memory_without_gates_is_timed_beside_the_delta_rule_at_its_chunk():
    memory, delta = (lengths.MECHANISMS[name] for name in ("memory, without gates", "linear, delta rule"))
    assert set(memory.inputs(8)) == {"query", "key", "value", "weights", "rate"}
    default = inspect.signature(attnlab.linear_attention).parameters["chunk_size"].default
    assert memory.large(2048)["chunk_size"] == delta.large(2048).get("chunk_size", default)


@pytest.mark.long
def test_bench_times_how_prompts_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prompts, "_FEATURES", 64)
    monkeypatch.setattr(prompts, "_DEPTH", 1)
    command = ["bench", "--prompts", "--lengths", "256", "--only", "linear, retention"]
    assert cli.main([*command, "--workdir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [(row["mixer"], row["length"]) for row in rows] == [("linear, retention", 256)]
    assert all(row[way] > 0 for row in rows for way in ("seconds", "loop_seconds", "call_seconds"))
    table = prompts.table(rows)
    assert f" {256 * rows[0]['call_seconds'] / rows[0]['seconds']:.1f} |" in table.splitlines()[2]
    assert table in (tmp_path / "prompts.md").read_text()
    assert table in capsys.readouterr().out


def test_the_exponent_is_that_of_long_lengths():
    def rows(power):
        times = {1024: 9.0, **{length: 1e-9 * length**power for length in (4096, 8192, 16384)}}
        return [{"mechanism": "x", "length": n, "seconds": t, "temporary_bytes": 0} for n, t in times.items()]

    assert lengths.exponent(rows(1.5), "x") == pytest.approx(1.5)
    assert math.isnan(lengths.exponent(rows(1.5)[:2], "x"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "8"], "lengths: got 8"),
        (["--only", "nothing"], "only: got 'nothing'; need some of"),
        (["--only", "linear", "nothing"], "only: got 'nothing'; need some of"),
        (["--prompts", "--only", "axial"], "only: got 'axial'; need some of softmax"),
        (["--prompts", "--backward"], "backward: got it with --prompts"),
        (["--only", ""], "only: got ''; need some of"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert cli.main(["bench", *arguments, *([] if "--lengths" in arguments else ["--lengths", "256"])]) == 2
    assert message in capsys.readouterr().err
