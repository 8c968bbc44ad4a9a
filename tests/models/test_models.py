"""Models take any mixer by layer, decode as they compute, and report what they cost."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but

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


@pytest.mark.slow  # the fast tests hold it of mixers and of the product of layers
def test_gradients_in_bfloat16_are_about_those_in_float32(tokens):
    def gradients(dtype):
        mixers = [functools.partial(mixer, dtype=dtype) for mixer in HYBRID]
        model = LanguageModel(vocabulary=17, mixers=mixers, depth=2, features=16, dtype=dtype)
        values = nn.initialize(model, jax.random.key(0))
        found = jax.jit(jax.grad(lambda values: jnp.sum(jnp.sin(nn.bind(model, values)(tokens)))))(values)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

    narrow, wide = gradients(jnp.bfloat16), gradients(jnp.float32)
    assert np.linalg.norm(narrow - wide) < 0.1 * np.linalg.norm(wide)


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


@pytest.mark.long
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


@pytest.mark.slow
def test_generation_draws_below_a_number_and_fills_every_position(hybrid):
    """One token given and 12 drawn: the last is not read, so the model's 12 positions do."""
    bound = nn.bind(*hybrid)
    out = generate(bound, jnp.full((8, 1), 16), length=12, key=jax.random.key(0), temperature=10.0, below=3)
    assert out.shape == (8, 13)
    assert set(np.unique(out[:, 1:])) == {0, 1, 2}


def learning(tokens, **options):
    """The gradient of a model in training, compiled, (gradients, (loss, buffers)), and what it takes."""
    model = LanguageModel(vocabulary=17, features=16, dropout_rate=0.3, **{"mixers": HYBRID[1:], "depth": 1, **options})
    parameters, buffers = nn.split(model, nn.initialize(model, jax.random.key(0)))

    def loss(parameters):
        bound = nn.bind(model, nn.merge(parameters, buffers))
        loss = jnp.mean(bound(tokens, key=jax.random.key(2)) ** 2)
        learned, auxiliary = nn.learned(bound)
        return loss + auxiliary, (loss, learned)

    return jax.jit(jax.grad(loss, has_aux=True)).lower(parameters).compile(), parameters


def assert_alike(one, other):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one, other)


@pytest.mark.parametrize("remat", slow_but([True], [True, "products"]))
@pytest.mark.long
def test_remat_changes_memory_and_no_number(tokens, remat):
    (call, parameters), (plain, _) = (learning(tokens, remat=remat) for remat in (remat, False))
    assert_alike(call(parameters), plain(parameters))


def test_remat_of_all_but_products_keeps_more_than_that_of_all(tokens):
    kept = []
    for remat in (True, "products", False):
        model = LanguageModel(vocabulary=17, mixers=[nn.SoftmaxAttention], depth=2, features=16, remat=remat)
        values = jax.eval_shape(lambda model=model: nn.initialize(model, jax.random.key(0)))

        def backward(values, model=model):
            return jax.vjp(lambda values: nn.bind(model, values)(tokens), values)[1]

        residuals = jax.eval_shape(backward, values)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(residuals)))
    assert kept == sorted(set(kept))


ROUTING = functools.partial(nn.RoutingAttention, clusters=2, window=3)


@pytest.mark.parametrize(
    ("mixers", "depth", "remat"),
    [
        ([nn.SoftmaxAttention], 3, False),
        pytest.param(
            [nn.SoftmaxAttention, functools.partial(nn.LinearAttention, decay="data")], 5, True, marks=pytest.mark.slow
        ),
        pytest.param([ROUTING, nn.SoftmaxAttention], 4, "products", marks=pytest.mark.slow),
        pytest.param([ROUTING], 1, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_layers_in_a_loop_are_what_they_are_in_turn(tokens, mixers, depth, remat):
    """Gradients, dropout, buffers and what layers add to the loss; layers that fill no turn come after the loop."""
    options = {"mixers": mixers, "depth": depth, "remat": remat}
    (call, parameters), (plain, _) = (learning(tokens, scan_layers=scans, **options) for scans in (True, False))
    assert_alike(call(parameters), plain(parameters))


def test_a_deep_model_in_a_loop_is_no_longer_a_program_than_a_shallow_one(tokens):
    sizes = []
    for depth in (2, 12):
        model = LanguageModel(vocabulary=17, mixers=[nn.SoftmaxAttention], depth=depth, features=16, scan_layers=True)
        values = jax.eval_shape(lambda model=model: nn.initialize(model, jax.random.key(0)))
        jaxpr = jax.make_jaxpr(lambda values, model=model: nn.bind(model, values)(tokens))(values)
        sizes.append(sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr.jaxpr)))
    assert sizes[0] == sizes[1]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.long
def test_dropout_is_decided_by_the_key_alone(hybrid, tokens):
    model, parameters = hybrid
    call = compiled(model)
    first, again, other = (call(parameters, tokens, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert np.any(first != call(parameters, tokens))


@pytest.fixture(scope="module")
def packing():
    """A model with positions for 5 tokens, its values, and a row of three documents."""
    mixers = [
        functools.partial(nn.LocalAttention, window=2, sinks=2),
        functools.partial(nn.LinearAttention, convolution=3),
    ]
    model = LanguageModel(vocabulary=17, mixers=mixers, depth=2, features=16, max_length=5)
    tokens = jax.random.randint(jax.random.key(1), (1, 15), 0, 17)
    return model, nn.initialize(model, jax.random.key(0)), tokens, jnp.repeat(jnp.array([[7, 3, 7]]), 5, axis=1)


@pytest.mark.long
def test_packed_documents_give_what_each_gives_alone(packing):
    model, values, tokens, ids = packing
    call = functools.partial(compiled(model), values)
    alone = call(tokens.reshape(3, 5)).reshape(1, 15, 17)
    np.testing.assert_allclose(call(tokens, segment_ids=ids), alone, atol=2e-5)


@pytest.mark.long
def test_padding_in_a_segment_of_its_own_changes_nothing_of_the_tokens(packing):
    model, values, tokens, ids = packing
    is_token = ids == 3

    @jax.jit
    def evaluate(values, tokens):
        def loss(values):
            logits = nn.bind(model, values)(tokens, segment_ids=ids)
            return jnp.sum(jnp.where(is_token[..., None], logits, 0) ** 2), logits

        gradients, logits = jax.grad(loss, has_aux=True)(values)
        return logits[:, 5:10], gradients

    for padding in (0, 16):
        got = evaluate(values, jnp.where(is_token, tokens, padding))
        jax.tree.map(np.testing.assert_array_equal, got, evaluate(values, tokens))


@pytest.mark.long
def test_a_document_longer_than_the_model_s_positions_has_no_numbers(packing):
    """Which a compiled program cannot refuse."""
    model, values, tokens, _ = packing
    logits = compiled(model)(values, tokens, segment_ids=jnp.zeros_like(tokens))
    assert np.all(np.isnan(logits[:, 5:]))


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


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(jnp.zeros((1, 4), jnp.int32)),
        lambda model: model.step(model.init_cache(1, 4), jnp.zeros(1, jnp.int32)),
        lambda model: generate(model, jnp.zeros((1, 4), jnp.int32), length=2, key=jax.random.key(0)),
        lambda model: jax.jit(lambda tokens: model(tokens))(jnp.zeros((1, 4), jnp.int32)),
        lambda model: model.layers[0].mixer(jnp.zeros((1, 4, 16))),
        lambda model: ImageClassifier(image_size=(4, 4, 1), classes=2, mixers=[nn.SoftmaxAttention], features=16)(
            jnp.zeros((1, 4, 4, 1))
        ),
    ],
)
def test_a_model_without_values_says_what_to_do(hybrid, call):
    with pytest.raises(ValueError, match="model: got one without values") as error:
        call(hybrid[0])
    advice = "call attnlab.nn.bind(model, attnlab.nn.initialize(model, key)) first"
    assert str(error.value).splitlines()[0] == f"model: got one without values; {advice}"


def test_bad_inputs_are_named(hybrid):
    bound = nn.bind(*hybrid)
    with pytest.raises(ValueError, match=r"tokens: got float32"):
        bound(jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="max_length is 12"):
        bound(jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="positions for 12 tokens"):
        bound.init_cache(1, 13)
    with pytest.raises(ValueError, match="max_length: got 0; need at least 1"):
        bound.init_cache(1, 0)
    with pytest.raises(ValueError, match=r"tokens: got int32\[1,1\]; need integers \[batch\]"):
        bound.step(bound.init_cache(1, 4), jnp.zeros((1, 1), jnp.int32))
