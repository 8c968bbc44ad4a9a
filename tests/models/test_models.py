"""Models take any mixer by layer, decode as they compute, and report what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import nn
from attnlab.models import ImageClassifier, LanguageModel, SequenceRegressor, generate

HYBRID = [functools.partial(nn.LocalAttention, window=4), functools.partial(nn.LinearAttention, decay="data")]


@pytest.fixture(scope="module")
def hybrid():
    model = LanguageModel(vocabulary=17, mixers=HYBRID, depth=3, features=16, max_length=12, dropout_rate=0.3)
    return model, nn.initialize(model, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, 17)


def compiled(model):
    """The model as one program: (values, inputs) -> outputs."""
    return jax.jit(lambda values, *inputs, **options: nn.bind(model, values)(*inputs, **options))


def test_layers_take_the_mixers_in_turn(hybrid):
    kinds = [type(block.mixer).__name__ for block in hybrid[0].layers]
    assert kinds == ["LocalAttention", "LinearAttention", "LocalAttention"]


def test_depth_is_an_integer():
    with pytest.raises(TypeError, match=r"depth: got 2\.0; need an int"):
        LanguageModel(vocabulary=8, mixers=HYBRID, depth=2.0, features=16)


def test_a_model_decodes_if_its_mixers_do():
    assert LanguageModel(vocabulary=8, mixers=HYBRID, depth=2, features=16).decoding_refusal == ""
    leaking = functools.partial(nn.RoutingAttention, clusters=2, window=4, membership="global")
    mute = LanguageModel(vocabulary=8, mixers=[*HYBRID, leaking], depth=3, features=16)
    assert mute.decoding_refusal == "membership: got 'global'; only \"strict\" decodes"
    assert mute.state_size(8) is None
    # Their first two layers are the same.
    assert LanguageModel(vocabulary=8, mixers=[*HYBRID, leaking], depth=2, features=16).state_size(8) > 0
    image = ImageClassifier(image_size=(4, 4, 1), classes=2, mixers=[nn.SoftmaxAttention], depth=1, features=16)
    assert image.decoding_refusal == "SoftmaxAttention: only a causal mixer decodes; this one has is_causal=False"


def test_decoding_equals_the_call(hybrid, tokens):
    model, parameters = hybrid
    logits = compiled(model)(parameters, tokens)
    assert logits.shape == (2, 12, 17)
    assert logits.dtype == jnp.float32
    bound, got = nn.bind(model, parameters), []
    step = jax.jit(lambda parameters, cache, token: nn.bind(model, parameters).step(cache, token))
    cache = bound.init_cache(2, 12)
    for token in tokens.T:
        out, cache = step(parameters, cache, token)
        got.append(out)
    np.testing.assert_allclose(jnp.stack(got, axis=1), logits, atol=2e-5)


def test_generation_continues_the_prompt_as_the_call_would(hybrid, tokens):
    model, parameters = hybrid
    bound = nn.bind(model, parameters)
    out = generate(bound, tokens[:, :5], length=6, key=jax.random.key(0), temperature=0)
    assert out.shape == (2, 11)
    np.testing.assert_array_equal(out[:, :5], tokens[:, :5])
    np.testing.assert_array_equal(out[:, 5:], jnp.argmax(compiled(model)(parameters, out), axis=-1)[:, 4:-1])


def test_generation_draws_below_a_number_and_fills_every_position(hybrid):
    """One token given and 12 drawn: the last is not read, so the model's 12 positions do."""
    bound = nn.bind(*hybrid)
    out = generate(bound, jnp.full((8, 1), 16), length=12, key=jax.random.key(0), temperature=10.0, below=3)
    assert out.shape == (8, 13)
    assert set(np.unique(out[:, 1:])) == {0, 1, 2}


def test_remat_changes_memory_and_no_number(tokens):
    def loss_and_gradient(remat):
        model = LanguageModel(vocabulary=17, mixers=HYBRID, depth=2, features=16, dropout_rate=0.3, remat=remat)
        parameters = nn.initialize(model, jax.random.key(0))

        def loss(parameters):
            return jnp.mean(nn.bind(model, parameters)(tokens, key=jax.random.key(2)) ** 2)

        return jax.jit(jax.value_and_grad(loss))(parameters)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7),
        loss_and_gradient(True),
        loss_and_gradient(False),
    )


def test_dropout_is_decided_by_the_key_alone(hybrid, tokens):
    model, parameters = hybrid
    call = compiled(model)
    first, again, other = (call(parameters, tokens, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert np.any(first != call(parameters, tokens))


def test_packed_documents_do_not_see_each_other(tokens):
    model = LanguageModel(vocabulary=17, mixers=[nn.SoftmaxAttention, *HYBRID], depth=3, features=16)
    call = functools.partial(compiled(model), nn.initialize(model, jax.random.key(0)))
    packed = call(tokens, segment_ids=jnp.repeat(jnp.array([[0, 1]]), 6, axis=1).repeat(2, axis=0))
    apart = jnp.concatenate([call(tokens[:, :6]), call(tokens[:, 6:])], axis=1)
    np.testing.assert_allclose(packed, apart, atol=2e-5)


def test_flops_agree_with_the_compiler_where_it_counts_the_same():
    """One layer whose attention is small beside its products: within 3 % of XLA's count."""
    model = LanguageModel(vocabulary=512, mixers=[nn.SoftmaxAttention], depth=1, features=128)
    shapes = jax.eval_shape(lambda: nn.initialize(model, jax.random.key(0)))
    lowered = jax.jit(lambda p, t: nn.bind(model, p)(t)).lower(shapes, jax.ShapeDtypeStruct((1, 32), jnp.int32))
    assert model.flops(32) == pytest.approx(lowered.compile().cost_analysis()["flops"], rel=0.05)


@pytest.mark.parametrize("mixer", [nn.SoftmaxAttention, functools.partial(nn.LocalAttention, window=3)])
def test_classifier_maps_images_to_logits(mixer):
    model = ImageClassifier(image_size=(8, 12, 3), classes=5, mixers=[mixer], patch=2, depth=2, features=16)
    images = jax.random.uniform(jax.random.key(0), (3, 8, 12, 3))
    logits = compiled(model)(nn.initialize(model, jax.random.key(0)), images)
    assert logits.shape == (3, 5)
    assert np.all(np.isfinite(logits))


def test_a_regressor_answers_each_place_from_what_came_before():
    model = SequenceRegressor(channels=3, mixers=HYBRID, depth=2, features=16)
    call = functools.partial(compiled(model), nn.initialize(model, jax.random.key(0)))
    vectors = jax.random.normal(jax.random.key(1), (2, 9, 3))
    answers = call(vectors)
    assert answers.shape == (2, 9)
    changed = call(vectors.at[:, 5].add(1.0))
    np.testing.assert_array_equal(changed[:, :5], answers[:, :5])
    assert np.all(changed[:, 5] != answers[:, 5])
    with pytest.raises(ValueError, match=r"vectors: got \[2, 9, 2\]; need \[batch, length, 3\]"):
        call(vectors[..., :2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LanguageModel(vocabulary=4, mixers=[]), "mixers: got an empty list"),
        (lambda: LanguageModel(vocabulary=4, mixers=HYBRID, depth=0), "depth: got 0"),
        (lambda: ImageClassifier(image_size=(8, 8, 1), classes=2, mixers=HYBRID, patch=3), "patch: got 3"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_inputs_are_named(hybrid):
    bound = nn.bind(*hybrid)
    with pytest.raises(ValueError, match=r"tokens: got float32"):
        bound(jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="max_length is 12"):
        bound(jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="positions for 12 tokens"):
        bound.init_cache(1, 13)
