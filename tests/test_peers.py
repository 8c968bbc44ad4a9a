"""Times beside other libraries."""

import importlib
import sys

import pytest

from attnlab import peers


def test_calls_take_turns():
    order = []
    times = peers.interleaved([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == ["a", "b"] * 3
    assert len(times) == 2


@pytest.mark.slow
def test_a_peer_that_is_missing_leaves_the_others(tmp_path, monkeypatch, capsys):
    there = importlib.import_module

    def without_torch(name, *args):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return there(name, *args)

    monkeypatch.setattr(importlib, "import_module", without_torch)
    monkeypatch.setattr(peers, "_SIZES", ((1, 4),))
    given = ["peers", "--only", "dense", "agents", "--length", "8", "--runs", "1", "--workdir"]
    monkeypatch.setattr(sys, "argv", [*given, str(tmp_path)])
    peers.main()
    rows = (tmp_path / "peers.md").read_text().splitlines()[4:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| dense",
        "| causal agents (16), 1 x 4",
        "| causal agents (16), 1 x 4, with gradients",
    ]
    assert "missing: torch" in rows[0]
    assert capsys.readouterr().out.splitlines()[2:] == rows
