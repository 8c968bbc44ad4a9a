"""Pictures of mixers: written for every kind of model, and true to what a query sees."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from attnlab import cli, nn
from attnlab.errors import UserError
from attnlab.models import LanguageModel
from attnlab.show import show, skips_tiles


@pytest.mark.parametrize(
    "configs",
    [
        ["experiments/mixers/hybrid.gin", "--gin.WINDOW=8", "--length", "40"],
        ["experiments/image/digits.gin", "experiments/mixers/local.gin", "--gin.WINDOW=3"],
        pytest.param(["experiments/mixers/axial.gin"], marks=pytest.mark.slow),
        pytest.param(["experiments/mixers/routing.gin", "--length", "50"], marks=pytest.mark.slow),
    ],
    ids=["language", "image", "mixer of images", "routing"],
)
@pytest.mark.long
def test_show_writes_a_picture(configs, tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert cli.main(["show", *configs, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == f"wrote {out}"


@pytest.mark.long
def test_the_numbers_in_the_picture_are_those_of_the_window(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: titles.extend(texts(figure)))
    model = LanguageModel(vocabulary=8, mixers=[functools.partial(nn.LocalAttention, window=5)], depth=2, features=32)
    show(model, tmp_path / "unused.png", length=32)
    pairs = sum(min(i + 1, 5) for i in range(32))
    assert f"LocalAttention, layer 0, 1: {pairs / 32:.1f} of 32 keys per query" in titles
    assert "tiles of 16 x 16: 3 of 4 seen into, 0 wholly;\nskipping the others is at most 1.3 times faster" in titles
    assert {"nothing seen", "partly seen", "wholly seen"} <= set(titles)
    assert "receptive field of the last token: 9 of 32 tokens" in titles


SKIPPING = {"SoftmaxAttention", "LocalAttention", "windowed LocalLinearAttention", "windowed ParallaxAttention"}
MIXERS = {
    "SoftmaxAttention": nn.SoftmaxAttention,
    "LocalAttention": functools.partial(nn.LocalAttention, window=4),
    "DilatedAttention": functools.partial(nn.DilatedAttention, window=4, dilation=2),
    "LinearAttention": nn.LinearAttention,
    "AgentAttention": functools.partial(nn.AgentAttention, agents=4),
    "RoutingAttention": functools.partial(nn.RoutingAttention, clusters=2, window=8),
    "LocalLinearAttention": nn.LocalLinearAttention,
    "windowed LocalLinearAttention": functools.partial(nn.LocalLinearAttention, window=4),
    "ParallaxAttention": nn.ParallaxAttention,
    "windowed ParallaxAttention": functools.partial(nn.ParallaxAttention, window=4),
}


@pytest.mark.parametrize("name", MIXERS)
def test_only_mixers_that_skip_tiles_are_called_faster_for_it(name):
    mixer = MIXERS[name](16, num_heads=2, is_causal=True)
    assert skips_tiles(mixer) == (name in SKIPPING)


def test_a_linear_mixer_s_picture_claims_no_speed(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: titles.extend(texts(figure)))
    show(LanguageModel(vocabulary=8, mixers=[nn.LinearAttention], depth=1, features=32), tmp_path / "x.png", length=32)
    assert any("tiles of 16 x 16: 3 of 4 seen into" in text for text in titles)
    assert not any("faster" in text for text in titles)


class Bounded(nn.SoftmaxAttention):
    """Not linear in its values."""

    def mix(self, query, key, value, x, segment_ids):
        return jnp.tanh(super().mix(query, key, 3 * value, x, segment_ids))


def test_what_has_no_weights_is_not_shown(tmp_path):
    with pytest.raises(UserError, match="show: mixers: got Bounded, which is not linear in its values"):
        show(LanguageModel(vocabulary=8, mixers=[Bounded], depth=1, features=32), tmp_path / "x.png", length=16)
    assert list(tmp_path.iterdir()) == []


def texts(figure):
    found = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert np.any(found)
    return found
