"""A mixer of one's own that sees later tokens is refused before the first step; no causal one is."""

import functools

import jax.numpy as jnp
import pytest
import runs
from marks import slow_but
from mixers import MIXERS

from attnlab import data, masks, nn
from attnlab.errors import UserError
from attnlab.models import ImageClassifier, LanguageModel
from attnlab.train import (
    BlockDiffusionTask,
    Experiment,
    ImageClassificationTask,
    LanguageTask,
    OptimizerOptions,
    SequenceTask,
    train,
)
from attnlab.train.causality import check_causality, find_leak

LENGTH = 40


class OwnMixer(nn.Attention):
    """Mixes the values [B, T, N, V] by a function of them alone."""

    def __init__(self, features, *, mixed, **shared):
        super().__init__(features, **shared)
        self.mixed = mixed

    def mix(self, query, key, value, x, segment_ids):
        return self.mixed(value)

    def mechanism_flops(self, space):
        return 0


def next_one(value):
    return jnp.roll(value, -1, axis=1)


def mean_of_all(value):
    return value + jnp.mean(value, axis=1, keepdims=True)


def mean_of_chunk(value):
    chunks = value.reshape(len(value), -1, 8, *value.shape[2:])
    return jnp.broadcast_to(chunks.mean(axis=2, keepdims=True), chunks.shape).reshape(value.shape)


def first_of_next_chunk(value):
    """At the last position of the first half alone."""
    return value.at[:, LENGTH // 2 - 1].add(value[:, LENGTH // 2])


def best_of_all(value):
    """A choice, which has no gradient."""
    return jnp.where(jnp.argmax(value, axis=1, keepdims=True) % 2 == 0, value, -value)


def sum_by_fourier(value):
    """Causal but for rounding."""
    length = value.shape[1]
    transformed = jnp.fft.rfft(value, 2 * length, axis=1)
    ones = jnp.fft.rfft(jnp.ones(length), 2 * length)[:, None, None]
    return jnp.fft.irfft(transformed * ones, axis=1)[:, :length]


def mean_with_maximum(value):
    """Causal but for rounding: what is subtracted before exp is the largest of all."""
    weights = jnp.exp(value - value.max(axis=1, keepdims=True))
    return jnp.cumsum(weights * value, axis=1) / jnp.cumsum(weights, axis=1)


def not_a_number(value):
    return jnp.full_like(value, jnp.nan)


LEAKING = [next_one, mean_of_all, mean_of_chunk, first_of_next_chunk, best_of_all]
CAUSAL = [sum_by_fourier, mean_with_maximum, not_a_number]


def own(mixed, **options):
    return functools.partial(OwnMixer, mixed=mixed, num_heads=2, **options)


@pytest.mark.parametrize("mixed", LEAKING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_leak_is_found(mixed, dtype):
    position, cut = find_leak(own(mixed)(8, is_causal=True, dtype=dtype), LENGTH)
    assert 0 <= position < cut < LENGTH


@pytest.mark.parametrize("mixed", CAUSAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_no_leak(mixed, dtype):
    def rounded(value):
        return mixed(value.astype(jnp.float32)).astype(value.dtype)

    assert find_leak(own(rounded)(8, is_causal=True, dtype=dtype), LENGTH) is None


SEQUENCES = [name for name, mixer in MIXERS.items() if not mixer.is_grid]


@pytest.mark.parametrize("name", slow_but(["softmax", "routing", "routing_global", "gated_delta"], SEQUENCES))
@pytest.mark.parametrize("length", slow_but([40], [1, 40]))
@pytest.mark.long
def test_of_the_library_s_mixers_only_the_one_that_says_so_leaks(name, length):
    leaks = name == "routing_global" and length > 1
    assert (find_leak(MIXERS[name](16), length) is not None) == leaks


@pytest.mark.long
def test_a_long_sequence_is_read_in_part_unless_the_mixer_takes_no_other():
    lengths = []

    def seen(value):
        lengths.append(value.shape[1])
        return value

    def of_one_length(value):
        return seen(value) * jnp.ones((6000, 1, 1))

    assert find_leak(own(seen)(4, is_causal=True), 6000) is None
    assert set(lengths) == {375}
    assert find_leak(own(of_one_length)(4, is_causal=True), 6000) is None
    assert set(lengths) == {375, 6000}


def model(*mixers, **options):
    return LanguageModel(vocabulary=256, mixers=mixers, depth=len(mixers), features=32, **options)


def test_it_is_refused_before_anything_is_written(tmp_path):
    task = LanguageTask(runs.corpus(), sequence_length=32)
    options = {"steps": 1, "batch_size": 1, "optimizer": OptimizerOptions(warmup_steps=0)}
    experiment = Experiment(model(nn.SoftmaxAttention, own(mean_of_all)), task, **options)
    message = r"^mixers: OwnMixer is to be causal and sees later tokens: .* position 0 .* from 1 on; mend its mix, or "
    with pytest.raises(UserError, match=message):
        train(experiment, workdir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_is_not_looked_at():
    """What is not causal, what measures its leak itself, and the library's own."""
    text = LanguageTask(runs.corpus(), sequence_length=32)
    leaking = model(own(mean_of_all))
    with pytest.raises(UserError):
        check_causality(leaking, text)
    check_causality(leaking, LanguageTask(runs.corpus(), sequence_length=32, probe_future=True))
    check_causality(model(functools.partial(nn.RoutingAttention, clusters=2, window=4, membership="global")), text)
    classifier = ImageClassifier(image_size=(8, 8, 1), classes=10, mixers=[own(mean_of_all)], depth=1, features=8)
    check_causality(classifier, ImageClassificationTask(data.digits()))


def test_a_task_of_drawn_sequences_is_told_of_no_probe():
    task = SequenceTask(data.Copy(length=16, vocabulary=16))
    with pytest.raises(UserError, match=r"mend its mix$"):
        check_causality(model(own(mean_of_all)), task)


class Masked(nn.SoftmaxAttention):
    """Takes the mask that it is given, or another one."""

    def __init__(self, features, *, other=None, **shared):
        super().__init__(features, **shared)
        self.other = other

    def mix_masked(self, query, key, value, mask):
        return super().mix_masked(query, key, value, self.other or mask)


@pytest.mark.parametrize("other", [pytest.param(None, marks=pytest.mark.long), masks.block_diffusion(32, 8)])
def test_a_pattern_of_the_task_is_what_counts(other):
    """Blocks of 8 in place of 4: a noisy token sees some of the block after its own."""
    task = BlockDiffusionTask(runs.corpus(), sequence_length=32, block=4)
    mixed = model(functools.partial(Masked, other=other))
    if other is None:
        check_causality(mixed, task)
        return
    with pytest.raises(UserError, match=r"^mixers: Masked sees tokens that the task's pattern hides: its output at"):
        check_causality(mixed, task)
