"""What JAX does to functions, and where it lays arrays: every public call obeys, in a larger program or alone."""

import contextlib
import functools
import gc
import os
import pathlib
import re
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import BATCH, CALLS
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from marks import slow_but

import attnlab
from attnlab.catalog import MECHANISMS

# One of each kind is quick: all of the table takes minutes, to trace it as to compile it.
_KINDS = {"local, sinks and segments", "linear, gated delta segments", "local-linear step"}
every_kind = pytest.mark.parametrize("name", slow_but(_KINDS, CALLS))
one_kind = pytest.mark.parametrize("name", slow_but({"local, sinks and segments"}, CALLS))


def gradient(name):
    """(arrays) -> results, and gradients for all floating arrays of what is finite in them."""
    function, _ = CALLS[name]

    def loss(*arrays):
        results = function(*arrays)
        floating = [x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
        # lse is -inf where nothing is seen, and a step past its cache gives NaN.
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0) ** 2) for x in floating), results

    def run(*arrays):
        is_floating = [jnp.issubdtype(jax.tree.leaves(x)[0].dtype, jnp.floating) for x in arrays]
        numbers = tuple(number for number, flag in enumerate(is_floating) if flag)
        return jax.grad(loss, argnums=numbers, has_aux=True, allow_int=True)(*arrays)[::-1]

    return run


@functools.cache
def expected(name):
    return jax.tree.map(np.asarray, jax.jit(gradient(name))(*CALLS[name][1]))


def assert_close(got, want, tolerance=3e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if x.dtype != jax.dtypes.float0:
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            largest = np.abs(y[np.isfinite(y)]).max(initial=1)
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


def has_batch(x):
    return getattr(x, "ndim", 0) >= 1 and x.shape[0] == BATCH


# --- Modes of tracing -------------------------------------------------------------------------------------------------


@one_kind
@pytest.mark.long
def test_no_rank_is_promoted_and_no_tracer_leaks(name):
    with jax.numpy_rank_promotion("raise"), jax.checking_leaks():
        jax.jit(gradient(name)).trace(*CALLS[name][1])


@every_kind
def test_no_nan_is_made_on_the_way(name):
    if name in ("dot_product step", "local-linear step", "parallax step"):
        pytest.skip("is NaN past its cache by its contract, which five tokens of six do not reach")
    with jax.debug_nans(True):
        jax.block_until_ready(jax.jit(gradient(name))(*CALLS[name][1]))


@every_kind
@pytest.mark.long
def test_float32_is_float32_under_x64_and_float64_is_served(name):
    function, arrays = CALLS[name]
    with jax.enable_x64(True), warnings.catch_warnings(action="error"):
        results = jax.jit(gradient(name))(*arrays)
        wide = jax.tree.map(lambda x: np.asarray(x, _wider(x.dtype)), arrays)
        jax.eval_shape(function, *wide)
        assert_close(jax.tree.map(np.asarray, results), expected(name))


def _wider(dtype):
    return {"float32": np.float64, "int32": np.int64}.get(dtype.name, dtype)


@every_kind
def test_one_exported_program_serves_any_batch(name):
    function, arrays = CALLS[name]
    (batch,) = jax.export.symbolic_shape("b")

    def struct(x):
        return jax.ShapeDtypeStruct((batch, *x.shape[1:]) if has_batch(x) else x.shape, x.dtype)

    exported = jax.export.export(jax.jit(function))(*jax.tree.map(struct, arrays))
    assert_close(exported.call(*arrays), expected(name)[0])


# --- vmap over the batch: every row of it by itself -------------------------------------------------------------------


@every_kind
def test_vmap_over_rows_is_the_batch(name):
    """Of steps too, so that every sequence of a batch has positions of its own."""
    function, arrays = CALLS[name]
    if name in ("fit_routing", "update_routing", "routing, all results"):
        pytest.skip("gives sums over the batch")
    axes = jax.tree.map(lambda x: 0 if has_batch(x) else None, arrays)
    rows = jax.tree.map(lambda x: x[:, None] if has_batch(x) else x, arrays)
    got = jax.jit(jax.vmap(function, in_axes=axes))(*rows)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected(name)[0]), strict=True):
        if has_batch(y):
            assert_close(x[:, 0], y)
        elif y.ndim > 2:  # of a scan: [steps, B, ...]
            assert_close(np.moveaxis(np.asarray(x)[:, :, 0], 0, 1), y)


# --- Devices ----------------------------------------------------------------------------------------------------------


def mesh_of(kind):
    return jax.make_mesh((2,), ("data",), axis_types=(kind,))


def by_batch(x):
    return PartitionSpec("data") if has_batch(x) else PartitionSpec()


def by_heads(x):
    is_sharded = has_batch(x) and x.ndim >= 4 and x.shape[-2] % 2 == 0
    return PartitionSpec(*[None] * (x.ndim - 2), "data") if is_sharded else PartitionSpec()


def by_positions(x):
    is_sharded = has_batch(x) and x.ndim > 1 and x.shape[1] % 2 == 0
    return PartitionSpec(None, "data") if is_sharded else PartitionSpec()


LAYOUTS = {"batch": by_batch, "heads": by_heads, "positions": by_positions}


def by_result(x):
    """In shard_map: the specs of results, of scans [steps, B, ...] too."""
    if has_batch(x):
        return PartitionSpec("data")
    return PartitionSpec(None, "data") if x.ndim > 2 and x.shape[1] == BATCH else PartitionSpec()


def in_shard_map(function, arrays, results, check_vma):
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh_of(AxisType.Auto),
            in_specs=tuple(jax.tree.map(by_batch, arrays)),
            out_specs=jax.tree.map(by_result, results),
            check_vma=check_vma,
        )
    )


_SUMMED = ("fit_routing", "update_routing", "routing, all results")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", slow_but(_KINDS, [name for name in CALLS if name not in _SUMMED]))
def test_shard_map_takes_values_and_gradients(name, check_vma):
    """Traced alone; the next test computes."""
    function, arrays = CALLS[name]
    results = jax.eval_shape(function, *arrays)
    in_shard_map(function, arrays, results, check_vma).trace(*arrays)
    if check_vma:
        floating = [x for x in arrays if jnp.issubdtype(jax.tree.leaves(x)[0].dtype, jnp.floating)]
        in_shard_map(lambda *arrays: gradient(name)(*arrays)[1], arrays, tuple(floating), True).trace(*arrays)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", slow_but(_KINDS, [name for name in CALLS if name not in _SUMMED]))
def test_shard_map_computes_what_one_device_does(name, check_vma):
    function, arrays = CALLS[name]
    want = expected(name)[0]
    assert_close(in_shard_map(function, arrays, want, check_vma)(*arrays), want)


@pytest.mark.parametrize("kind", ["explicit", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", slow_but({"batch"}, LAYOUTS))
@every_kind
def test_a_mesh_computes_what_one_device_does(name, layout, kind):
    """And on Explicit axes, whose arrays say how they lie, the results lie as the query does."""
    _, arrays = CALLS[name]
    mesh = mesh_of(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, LAYOUTS[layout](x))), arrays)
    with jax.set_mesh(mesh):
        results, gradients = jax.jit(gradient(name))(*placed)
    assert_close((results, gradients), expected(name))


# XLA gathers what jax.lax.top_k chooses from.
_BY_TOP_K = ("routing, global", "routing, global with a mask", "sparse_cache step")
_KEPT = [name for name in CALLS if name not in _BY_TOP_K]


@pytest.mark.long
@pytest.mark.parametrize("name", slow_but(_KINDS | {"block-sparse, pooled", "pyramid step"}, _KEPT))
def test_devices_that_share_a_batch_keep_their_examples(name):
    """Under Auto axes, which XLA follows, they sum what examples share, and whether any number is not finite. None
    needs another's examples."""
    _, arrays = CALLS[name]
    mesh = mesh_of(AxisType.Auto)
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, by_batch(x))), arrays)
    program = jax.jit(gradient(name)).lower(*placed).compile().as_text()
    assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", program)


@pytest.mark.parametrize("in_context", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_kind
def test_explicit_axes_are_traced_in_every_layout(name, layout, in_context):
    function, arrays = CALLS[name]
    mesh = mesh_of(AxisType.Explicit)

    def struct(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, LAYOUTS[layout](x)))

    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        results = jax.eval_shape(function, *jax.tree.map(struct, arrays))
    query = arrays[0]
    out = jax.tree.leaves(results)[0]
    if hasattr(query, "shape") and out.shape[:-1] == query.shape[:-1]:
        assert out.sharding.spec[: query.ndim - 1] == _padded(LAYOUTS[layout](query), query.ndim)[:-1]


def _padded(spec, rank):
    return PartitionSpec(*spec, *[None] * (rank - len(spec)))


# --- Without jit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but({"inline"}, MECHANISMS))
@pytest.mark.long
def test_a_second_call_without_jit_costs_what_it_costs_with_it(name):
    mechanism = MECHANISMS[name]
    arrays = jax.tree.map(jnp.asarray, mechanism.inputs())
    jitted = jax.jit(lambda arrays: mechanism(arrays))
    differentiated = jax.grad(lambda arrays: jnp.sum(mechanism(arrays)))
    for function in (mechanism, jitted, differentiated):
        jax.block_until_ready(function(arrays))

    def seconds(function):
        def once():
            start = time.process_time()
            jax.block_until_ready(function(arrays))
            return time.process_time() - start

        return min(once() for _ in range(5))

    assert seconds(mechanism) < seconds(jitted) + 5e-3
    assert seconds(differentiated) < seconds(jitted) + 50e-3  # its derivative rules are applied anew, not compiled

    def left_behind():
        before = _resident()
        for _ in range(100):
            jax.block_until_ready(mechanism(arrays))
        return _resident() - before

    if sys.platform == "linux":
        assert any(left_behind() < 2**20 for _ in range(3))


def _resident():
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_an_option_of_another_type_is_another_call():
    """Python takes True for 1 and for 1.0, and a cache keyed by values alone would too."""
    query = np.zeros((1, 4, 1, 2), np.float32)
    attnlab.local_attention(query, query, query, window=1)
    for window in (True, 1.0):
        with pytest.raises(TypeError, match="window"):
            attnlab.local_attention(query, query, query, window=window)


@pytest.mark.long
def test_a_function_among_the_options_is_called_anew():
    query = np.ones((1, 4, 1, 2), np.float32)
    factor = [1.0]

    def scaled(x):
        return factor[0] * x

    first = attnlab.linear_attention(query, query, query, feature_map=scaled)
    factor[0] = 2.0
    assert_close(attnlab.linear_attention(query, query, query, feature_map=scaled), 4 * first)


def test_explain_answers_alike_each_time():
    query = jnp.zeros((1, 8, 1, 4))
    jitted = jax.jit(lambda q: attnlab.local_attention(q, q, q, window=2))
    jitted(query)
    answers = [attnlab.explain(function, query) for function in [jitted] * 3]
    assert answers[0] == answers[1] == answers[2]
    assert [choice.primitive for choice in answers[0]] == ["local_attention"]
