"""Outliers: robust objectives recall more where some values are noise; what is drawn, and what is searched."""

import json

import numpy as np
import pytest

from attnlab import cli
from attnlab.regress import outliers


def test_noise_takes_the_place_of_its_share_of_the_values():
    drawn = outliers.draw([0], 0.05, 16)
    key, value = drawn.tokens()
    np.testing.assert_allclose(np.linalg.norm(key, axis=-1), 1)
    np.testing.assert_array_equal(np.sort(drawn.order, axis=1)[0], np.repeat(np.arange(outliers.PAIRS), 16))
    assert drawn.is_noise.mean() == pytest.approx(0.05, abs=0.01)
    assert value[drawn.is_noise].std() == pytest.approx(10, rel=0.05)
    right = np.take_along_axis(drawn.value, drawn.order[..., None], axis=1)
    np.testing.assert_array_equal(value[~drawn.is_noise], right[~drawn.is_noise])
    assert not outliers.draw([0], 0.0, 1).is_noise.any()


@pytest.fixture(scope="module")
def drawn():
    return outliers.draw([1], 0.05, 1)


def test_the_error_is_that_of_the_delta_rule_over_pairs_whose_value_was_right(drawn):
    key, value = drawn.tokens()
    expected = []
    for row in range(len(key)):
        state = np.zeros((outliers.WIDTH, outliers.WIDTH))
        for k, v in zip(key[row], value[row]):
            state += 0.5 * np.outer(k, v - k @ state)
        error = np.mean((drawn.key[row] @ state - drawn.value[row]) ** 2, axis=-1)
        expected.append(error[drawn.order[row]][~drawn.is_noise[row]].mean())
    np.testing.assert_allclose(outliers.errors("l2", drawn, 0.5, 1.0), expected, rtol=1e-4)


def test_a_large_threshold_is_l2_and_a_fitting_one_errs_less(drawn):
    l2 = outliers.errors("l2", drawn, 0.5, 1.0)
    np.testing.assert_allclose(outliers.errors("huber_norm", drawn, 0.5, 1e4), l2, rtol=1e-4)
    assert outliers.errors("huber_norm", drawn, 0.5, 4.0).mean() < 0.7 * l2.mean()


def test_what_diverges_is_never_chosen(drawn):
    assert np.isinf(outliers.errors("lp, p = 3", drawn, 1.0, 1.0)).any()


@pytest.mark.long
def test_the_command_writes_a_table_rows_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(outliers, "READINGS", (1, 4))
    monkeypatch.setattr(outliers, "_RATES", (0.5, 0.125, 2.0**-11))
    assert cli.main(["regress", "outliers", "--seeds", "3", "--workdir", str(tmp_path)]) == 0
    assert "| setting | objective |" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "outliers.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * len(outliers.OBJECTIVES)
    noisy = {row["objective"]: row for row in rows if row["share"] > 0 and row["readings"] == 4}
    for name in ("huber", "huber_norm", "lp, p = 1.5", "l2, noise left out"):
        assert noisy[name]["high"] < 0
    assert noisy["l2"]["difference"] == 0
    assert "attnlab regress outliers --seeds 3" in (tmp_path / "outliers.md").read_text()
    assert (tmp_path / "outliers.png").stat().st_size > 10_000
