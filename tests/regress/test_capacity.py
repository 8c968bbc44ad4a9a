"""Capacity: memories err as the theory says, and more with every pair."""

import json
import math

import jax
import numpy as np
import pytest

from attnlab import cli
from attnlab.ablate import paired_difference
from attnlab.regress import capacity

DIMS, COUNTS = (8, 16), (4, 32)


@pytest.fixture(scope="module")
def measured():
    """By memory and count: [dims, seeds], in float64."""
    with jax.enable_x64(True):
        sizes = {"dims": DIMS, "seeds": range(40), "pairs": 64, "dtype": np.float64}
        return {(name, n): capacity.errors(name, n, **sizes) for name in ("linear", "delta rule") for n in COUNTS}


def test_keys_and_values_have_unit_length_and_counts_share_their_pairs():
    few, many = (capacity.draw(3, count, 8, pairs=12) for count in (2, 6))
    for x, y in zip(few, many):
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1)
        np.testing.assert_array_equal(x.reshape(-1, 8), y.reshape(-1, 8))
    assert few[0].shape == (6, 2, 8)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["linear", "delta rule"])
def test_errors_are_those_of_the_recurrence(name, count, measured):
    for dim, found in zip(DIMS, measured[name, count]):
        key, value = capacity.draw(5, count, dim, pairs=64)
        errors = []
        for keys, values in zip(key, value):
            state = np.zeros((dim, dim))
            for k, v in zip(keys, values):
                state = state + np.outer(k, v - (k @ state if name == "delta rule" else 0))
            errors.append(np.sum((keys @ state - values) ** 2, axis=-1).mean())
        np.testing.assert_allclose(found[5], np.mean(errors), rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "delta rule"])
def test_the_theory_is_within_the_interval_of_what_is_measured(name, measured):
    for count in COUNTS:
        for dim, found in zip(DIMS, measured[name, count]):
            expected = capacity.MEMORIES[name].expected(count, dim)
            less = paired_difference(dict(enumerate(found)), dict.fromkeys(range(len(found)), expected))
            assert less.low < 0 < less.high
            assert less.high - less.low < 0.15 * expected  # or any line would do


def test_errors_rise_with_the_pairs_and_fall_with_the_width(measured):
    for name in ("linear", "delta rule"):
        few, many = (measured[name, count].mean(axis=1) for count in COUNTS)
        assert (few < many).all()
        assert few[0] > few[1]
        assert many[0] > many[1]


def test_the_theory_of_two_pairs_and_of_very_many():
    # Of two pairs, one later write takes (k . k')^2 = 1/d of the first; the last one is whole.
    assert capacity.MEMORIES["delta rule"].expected(1, 8) == pytest.approx(0)
    assert capacity.MEMORIES["delta rule"].expected(2, 8) == pytest.approx(
        np.mean([2 - 3 * (7 / 8) + (1 - 18 / 80 + 1 / 80), 0])
    )
    assert capacity.MEMORIES["delta rule"].expected(4000, 8) == pytest.approx(2, abs=0.02)
    assert capacity.MEMORIES["softmax"].expected(10**6, 8) == pytest.approx(1, abs=1e-3)


def test_the_capacity_is_where_the_error_crosses():
    rows = [
        {"memory": "linear", "dim": dim, "pairs": n, "expected": (n - 1) / dim} for dim in (16, 999) for n in (2, 4, 8)
    ]
    found = capacity.capacities(rows, "linear", of="expected")
    assert found[16] == pytest.approx(1 + capacity.KEPT * 16)
    assert found[999] == math.inf


@pytest.mark.long
def test_the_command_writes_tables_rows_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(capacity, "COUNTS", (2, 16))
    monkeypatch.setattr(capacity, "DIMS", (8, 32))
    assert cli.main(["regress", "capacity", "--seeds", "2", "--workdir", str(tmp_path)]) == 0
    assert "| width | linear | linear, theory |" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "capacity.jsonl").read_text().splitlines()]
    assert len(rows) == len(capacity.MEMORIES) * 4
    softmax = [row for row in rows if row["memory"] == "softmax" and row["dim"] == 32 and row["pairs"] == 16]
    assert softmax[0]["error"] == pytest.approx(softmax[0]["expected"], rel=0.5)
    assert "attnlab regress capacity --seeds 2" in (tmp_path / "capacity.md").read_text()
    assert (tmp_path / "capacity.png").stat().st_size > 10_000
