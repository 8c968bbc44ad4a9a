"""Every model with every mixer under JAX's transformations and on meshes: what the plain program gives."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from marks import slow_but
from mixers import MIXERS

from attnlab import nn
from attnlab.models import AxialTransformer, ImageClassifier, LanguageModel, SequenceRegressor, generate, sample

BATCH, LENGTH, VOCABULARY = 4, 9, 11


def of_tokens(mixers, **options):
    model = LanguageModel(vocabulary=VOCABULARY, max_length=LENGTH, mixers=mixers, features=16, **options)
    return model, jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCABULARY)


def of_vectors(mixers, **options):
    model = SequenceRegressor(channels=3, mixers=mixers, features=16, **options)
    return model, jax.random.normal(jax.random.key(1), (BATCH, LENGTH, 3))


def of_images(mixers, **options):
    model = ImageClassifier(image_size=(5, 6, 2), classes=3, mixers=mixers, features=16, **options)
    return model, jax.random.normal(jax.random.key(1), (BATCH, 5, 6, 2))


def axial(size, **options):
    layers = {"exterior_layers": int(size[-1] > 1), "outer_layers": 1, "inner_layers": 1}
    model = AxialTransformer(image_size=size, levels=5, features=8, heads=2, **layers, **options)
    return model, jax.random.randint(jax.random.key(1), (BATCH, *size), 0, 5)


# (options) -> (model, input).
MODELS = {
    "hybrid": functools.partial(of_tokens, [MIXERS["local_sinks"], MIXERS["gated_delta"]], depth=2),
    "regressor": functools.partial(of_vectors, [MIXERS["gated"]], depth=1),
    "axial transformer": functools.partial(axial, (3, 4, 1)),
    "axial transformer, colour": functools.partial(axial, (3, 2, 2)),
    **{
        f"{name} alone": functools.partial(of_images if row.is_grid else of_tokens, [row], depth=1)
        for name, row in MIXERS.items()
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what it is given, and what the plain program makes of it."""

    model: Any
    recomputing: Any
    inputs: jax.Array
    parameters: Any
    buffers: Any

    def bound(self, parameters, model=None):
        return nn.bind(model or self.model, nn.merge(parameters, self.buffers))

    def evaluate(self, parameters, inputs, model=None):
        """The outputs, and the gradients of their mean square."""

        def loss(parameters):
            out = self.bound(parameters, model)(inputs)
            return jnp.mean(out**2), out

        gradients, out = jax.grad(loss, has_aux=True)(parameters)
        return out, gradients

    def train(self, parameters, inputs, key):
        bound = self.bound(parameters)
        return bound(inputs, key=key), nn.learned(bound)

    @property
    def generates(self):
        if isinstance(self.model, LanguageModel):
            return not self.model.decoding_refusal
        return isinstance(self.model, AxialTransformer)

    def generate(self, parameters, inputs, key):
        if isinstance(self.model, AxialTransformer):
            return sample(self.bound(parameters), count=inputs.shape[0], key=key, temperature=0)
        return generate(self.bound(parameters), inputs[:, :3], length=4, key=key, temperature=0)

    @functools.cached_property
    def want(self):
        return self.compiled("evaluate")(self.parameters, self.inputs)

    @functools.cached_property
    def generated(self):
        return self.compiled("generate")(self.parameters, self.inputs, jax.random.key(2)) if self.generates else None

    def compiled(self, method):
        """A method as a new program, which shares no trace with another one."""
        return jax.jit(lambda *given: getattr(self, method)(*given))

    def trace(self):
        jax.eval_shape(lambda *given: self.evaluate(*given), self.parameters, self.inputs)
        jax.eval_shape(lambda *given: self.train(*given), self.parameters, self.inputs, jax.random.key(0))
        if self.generates:
            jax.eval_shape(lambda *given: self.generate(*given), self.parameters, self.inputs, jax.random.key(2))

    def assert_runs(self):
        assert_equal(self.compiled("evaluate")(self.parameters, self.inputs), self.want)
        if self.generates:
            got = self.compiled("generate")(self.parameters, self.inputs, jax.random.key(2))
            assert_equal(got, self.generated)


@functools.cache
def case(name):
    model, inputs = MODELS[name]()
    parameters, buffers = nn.split(model, nn.initialize(model, jax.random.key(0)))
    return Case(model, MODELS[name](remat=True)[0], inputs, parameters, buffers)


def assert_equal(got, want):
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, want)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), got, want)


def rank_promotion(case):
    with jax.numpy_rank_promotion("raise"):
        case.trace()


def leaks(case):
    with jax.checking_leaks():
        case.trace()


def nans(case):
    with jax.debug_nans(True):
        case.assert_runs()


def wide_types(case):
    assert jax.tree.leaves(case.want)[0].dtype == jnp.float32, "computed before"
    with jax.enable_x64(True):
        case.assert_runs()


def forward_derivative(case):
    """Along the gradient, where it is the gradient's square."""
    (_, gradients), leaves = case.want, jax.tree.leaves(case.want[1])

    def loss(parameters):
        return jnp.mean(case.bound(parameters)(case.inputs) ** 2)

    got = jax.jit(lambda: jax.jvp(loss, (case.parameters,), (gradients,)))()[1]
    np.testing.assert_allclose(got, sum(jnp.sum(leaf**2) for leaf in leaves), rtol=1e-3)


def vmap(case):
    out, gradients = case.want
    pair = jnp.stack([case.inputs, case.inputs[::-1]])
    got = jax.jit(jax.vmap(case.evaluate, (None, 0)))(case.parameters, pair)
    assert_equal(got, (jnp.stack([out, out[::-1]]), jax.tree.map(lambda x: jnp.stack([x, x]), gradients)))


def loop_and_recomputation(case):
    """A model with remat, bound outside of a loop over batches, itself recomputed."""
    out, gradients = case.want

    def losses(parameters):
        bound = case.bound(parameters, case.recomputing)
        outs = jax.lax.map(jax.checkpoint(bound), jnp.stack([case.inputs, case.inputs[::-1]]))
        return jnp.mean(outs**2), outs

    got_gradients, outs = jax.jit(jax.grad(losses, has_aux=True))(case.parameters)
    assert_equal((outs, got_gradients), (jnp.stack([out, out[::-1]]), gradients))


def steps_of_rows_with_positions_of_their_own(case):
    if not isinstance(case.model, LanguageModel) or not case.generates:
        return
    tokens, logits = case.inputs, case.want[0]

    @jax.jit
    def decode(parameters):
        bound = case.bound(parameters)

        def after(tokens):
            cache = bound.init_cache(1, LENGTH)
            return jax.lax.scan(lambda cache, token: bound.step(cache, token[None])[::-1], cache, tokens)[0]

        caches = jax.tree.map(lambda *leaves: jnp.stack(leaves), after(tokens[0, :2]), after(tokens[1, :5]))
        rest = jnp.stack([tokens[0, 2:6, None], tokens[1, 5:9, None]], axis=1)
        return jax.lax.scan(lambda caches, tokens: jax.vmap(bound.step)(caches, tokens)[::-1], caches, rest)[1]

    want = jnp.stack([logits[0, 2:6], logits[1, 5:9]], axis=1)
    np.testing.assert_allclose(decode(case.parameters)[:, :, 0], want, rtol=1e-4, atol=2e-5)


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind, kind))


def shard_map(case, *, check_vma):
    def part(parameters, inputs):
        out, gradients = case.evaluate(parameters, inputs)
        if not check_vma:  # else JAX adds up the parts of what does not vary
            gradients = jax.lax.psum(gradients, "data")
        return out, jax.tree.map(lambda x: x / 2, gradients)

    data, whole = PartitionSpec("data"), PartitionSpec()
    on = functools.partial(jax.shard_map, mesh=mesh_of(AxisType.Auto), check_vma=check_vma)
    program = jax.jit(on(part, in_specs=(whole, data), out_specs=(data, whole)))
    assert_equal(program(case.parameters, case.inputs), case.want)
    if case.generates:
        program = jax.jit(on(lambda *given: case.generate(*given), in_specs=(whole, data, whole), out_specs=data))
        assert_equal(program(case.parameters, case.inputs, jax.random.key(2)), case.generated)


def placed(case, mesh):
    """Parameters with the heads of projections on `tensor`, and inputs with the batch on `data`."""

    def spec(leaf):
        by_heads = leaf.ndim == 3 and leaf.shape[1] == 4
        return PartitionSpec(None, "tensor") if by_heads else PartitionSpec()

    parameters = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), case.parameters)
    return parameters, jax.device_put(case.inputs, NamedSharding(mesh, PartitionSpec("data")))


def automatic_axes(case):
    mesh = mesh_of(AxisType.Auto)
    given = placed(case, mesh)
    with jax.set_mesh(mesh):
        assert_equal(case.compiled("evaluate")(*given), case.want)


def explicit_axes(case):
    mesh = mesh_of(AxisType.Explicit)
    given = placed(case, mesh)
    jax.eval_shape(lambda *given: case.evaluate(*given), *given)  # without a mesh in context
    with jax.set_mesh(mesh):
        out, gradients = case.compiled("evaluate")(*given)
        assert_equal((out, gradients), case.want)
        assert jax.typeof(out).sharding.spec[0] == "data"
        types = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (gradients, given[0]))
        assert types[0] == types[1]
        out, _ = jax.eval_shape(lambda *given: case.train(*given), *given, jax.random.key(0))
        assert out.sharding.spec[0] == "data"
        if case.generates:
            got = case.compiled("generate")(*given, jax.random.key(2))
            assert_equal(got, case.generated)


def symbolic_batch(case):
    (batch,) = jax.export.symbolic_shape("b")

    def struct(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    given = (
        jax.tree.map(struct, case.parameters),
        jax.ShapeDtypeStruct((batch, *case.inputs.shape[1:]), case.inputs.dtype),
    )
    exported = jax.export.export(case.compiled("evaluate"))(*given)
    assert_equal(exported.call(case.parameters, case.inputs), case.want)
    if case.generates:
        jax.export.export(case.compiled("generate"))(*given, jax.random.key(2))


HOWS = {
    **{
        how.__name__: how
        for how in (
            rank_promotion,
            leaks,
            nans,
            wide_types,
            forward_derivative,
            vmap,
            loop_and_recomputation,
            steps_of_rows_with_positions_of_their_own,
            automatic_axes,
            explicit_axes,
            symbolic_batch,
        )
    },
    "shard_map": functools.partial(shard_map, check_vma=False),
    "shard_map_with_check_vma": functools.partial(shard_map, check_vma=True),
}
# One model with most of what models do, and buffers where they matter.
LEFT_OUT = {"nans", "leaks", "forward_derivative", "shard_map", "automatic_axes"}
# Held of mechanisms in test_contract.py, and of recomputation in test_models.py.
LEFT_OUT |= {"vmap", "loop_and_recomputation", "wide_types"}
QUICK = {("softmax_convolved alone", how) for how in set(HOWS) - LEFT_OUT}


@pytest.mark.parametrize("row", slow_but(QUICK, list(itertools.product(MODELS, HOWS))), ids=", ".join)
@pytest.mark.long
def test_a_model_computes_the_same(row):
    name, how = row
    HOWS[how](case(name))
