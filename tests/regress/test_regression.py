"""Regression at test time: local linear attention ends below softmax attention at the same bandwidth, as published."""

import numpy as np
import pytest
from marks import slow_but

from attnlab import cli
from attnlab.regress import regression


@pytest.mark.parametrize("keys", regression.KEYS)
def test_values_are_a_linear_map_of_keys_that_changes_by_segment(keys):
    key, value = regression.draw(0, keys, length=48, segment=24, dim=4)
    np.testing.assert_allclose(np.linalg.norm(key, axis=-1), 1, rtol=1e-5)
    for part in (slice(0, 24), slice(24, 48)):
        fitted, *_ = np.linalg.lstsq(key[part], value[part], rcond=None)
        np.testing.assert_allclose(key[part] @ fitted, value[part], atol=1e-4)
    fitted, *_ = np.linalg.lstsq(key, value, rcond=None)
    assert np.abs(key @ fitted - value).max() > 0.1


@pytest.mark.parametrize("keys", slow_but({"clustered"}, regression.KEYS))
@pytest.mark.long
def test_local_linear_is_below_softmax_at_the_same_bandwidth(keys):
    found = regression.summary(regression.errors(keys, seeds=range(6), length=256))
    for ours, softmax in zip(found["local-linear"], found["softmax"], strict=True):
        assert ours < softmax


@pytest.mark.long
def test_the_command_writes_a_table_and_a_picture(tmp_path, capsys):
    assert cli.main(["regress", "--seeds", "1", "--workdir", str(tmp_path)]) == 0
    assert "| local-linear |" in capsys.readouterr().out
    assert "attnlab regress regression --seeds 1" in (tmp_path / "regression.md").read_text()
    assert (tmp_path / "regression.png").stat().st_size > 10_000


@pytest.mark.parametrize("seeds", ["0", "-1", "10001", "99999999999999"])
def test_a_wrong_number_of_seeds_is_named(seeds, capsys):
    assert cli.main(["regress", "--seeds", seeds]) == 2
    assert capsys.readouterr().err.endswith(f"attnlab: seeds: got {seeds}; need 1 to 10000\n")
