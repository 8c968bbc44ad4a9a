"""Texts: the probe for a leak from the future."""

import functools

import jax
import numpy as np
import pytest
from marks import slow_but

from attnlab import data, models, nn
from attnlab.train import LanguageTask


@pytest.mark.parametrize(
    ("membership", "leaks"), [pytest.param("strict", False, marks=pytest.mark.slow), ("global", True)]
)
@pytest.mark.long
def test_another_future_moves_the_past_of_leaking_models_alone(membership, leaks):
    text = np.random.default_rng(0).integers(16, size=2000).astype(np.uint8)
    task = LanguageTask(data.Corpus("noise", text[:1000], text[1000:]), sequence_length=32, probe_future=True)
    mixer = functools.partial(nn.RoutingAttention, clusters=4, window=8, membership=membership)
    model = models.LanguageModel(vocabulary=256, mixers=[mixer], depth=2, features=32)
    bound = nn.bind(model, nn.initialize(model, jax.random.key(0)))
    batch = next(iter(task.batches("validation", 8, 0)))
    both = jax.jit(lambda batch: (task.loss(bound, batch, key=None)[1], bound(batch["tokens"][:, :-1])))
    metrics, logits = both(batch)
    own, other = metrics["first half, own future"], metrics["first half, other future"]
    assert (metrics["leak"] > 0.05) == (abs(own - other) > 1e-5) == leaks
    assert leaks or metrics["leak"] == 0
    logits = np.asarray(logits, np.float64)[:, :15]
    picked = np.take_along_axis(logits, batch["tokens"][:, 1:16, None], axis=-1)[..., 0]
    np.testing.assert_allclose(own, np.mean(np.log(np.exp(logits).sum(-1)) - picked), rtol=1e-5)


@pytest.mark.parametrize("windows", slow_but([2], [1, 2, 5]))
@pytest.mark.parametrize(("membership", "leaks"), [("strict", False), ("global", True)])
@pytest.mark.long
def test_a_batch_of_copies_has_another_future_too(windows, membership, leaks):
    """Where validation has one window only, the other examples of its batch are copies of it."""
    text = np.random.default_rng(0).integers(8, size=200).astype(np.uint8)
    corpus = data.Corpus("noise", text, text[: windows * 32 + 1], vocabulary=8)
    task = LanguageTask(corpus, sequence_length=32, probe_future=True)
    mixer = functools.partial(nn.RoutingAttention, clusters=2, window=8, membership=membership, num_heads=2)
    model = models.LanguageModel(vocabulary=8, mixers=[mixer], depth=1, features=16)
    bound = nn.bind(model, nn.initialize(model, jax.random.key(0)))
    (batch,) = task.batches("validation", 5, 0)
    metrics = jax.jit(lambda batch: task.loss(bound, batch, key=None)[1])(batch)
    assert (metrics["leak"] > 0.01) == leaks


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_text_shorter_than_the_sequence_is_refused_when_the_task_is_built(part):
    texts = {"train": np.zeros(50, np.uint8), "validation": np.zeros(50, np.uint8), part: np.zeros(32, np.uint8)}
    with pytest.raises(ValueError, match=f"sequence_length: got 32; the {part} text of short has only 32 bytes"):
        LanguageTask(data.Corpus("short", **texts), sequence_length=32)


@functools.cache
def of_characters():
    symbols = tuple("abcdefgh")
    text = np.random.default_rng(0).integers(8, size=200).astype(np.int32)
    task = LanguageTask(data.Corpus("letters", text, text, "character", 8, symbols), sequence_length=12)
    model = models.LanguageModel(vocabulary=9, mixers=[nn.SoftmaxAttention], depth=1, features=16)
    return task, model, nn.initialize(model, jax.random.key(0))


@pytest.mark.long
def test_texts_are_continued_as_they_are_drawn():
    """From its own beginnings as `continuations` has them at once."""
    task, model, values = of_characters()
    beginnings = task.beginnings(2)
    draws = {"key": jax.random.key(1), "temperature": 1.0}
    added = list(task.continued(model, values, beginnings, length=9, **draws))
    assert [len(beginning) for beginning in beginnings] == [3, 3]
    assert all(len(piece) == 1 for pieces in added for piece in pieces)
    texts = [(task.corpus.decode(b), "".join(row)) for b, row in zip(beginnings, zip(*added))]
    assert texts == task.continuations(model, values, count=2, **draws)


@pytest.mark.long
def test_a_continuation_ends_after_a_text():
    """Of several tokens too; the others go on, and the prompts do not count."""
    task, model, values = of_characters()
    prompts = [task.corpus.encode(text) for text in ("a", "abcab")]
    draws = {"length": 9, "key": jax.random.key(1), "temperature": 1.0}
    plain = ["".join(row) for row in zip(*task.continued(model, values, prompts, **draws))]
    stop = plain[0][2:5]
    assert stop not in plain[1]
    added = list(task.continued(model, values, prompts, stop=["zz", stop], **draws))
    rows = list(zip(*added))
    assert rows[0] == (*plain[0][:5], *[None] * 4)
    assert rows[1] == tuple(plain[1])
    assert len(list(task.continued(model, values, prompts[:1], stop=[stop], **draws))) == 5
