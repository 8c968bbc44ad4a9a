"""Block-sparse attention: the published vectors, dense attention under the same mask, decoding, and its exchanges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import prompts
import pytest
from jax.test_util import check_grads
from marks import slow_but
from vector_files import assert_attention, vectors

import attnlab as A
from attnlab.attention import block_selection

FORMS = ("reference", "xla")


@pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
@pytest.mark.parametrize("name", ["lists_per_head", "causal_bias", "strict", "tree_strict", "gate_strict"])
def test_vectors(name, form):
    data = vectors(name)
    options = {"is_causal": name != "lists_per_head", "return_lse": True, "implementation": form}
    sizes = {size: data[size] for size in ("query_block", "key_block")}
    assert_attention(lambda given: A.block_sparse_attention(**given, blocks=data["blocks"], **sizes, **options), data)


def test_regions_of_an_image():
    """BiFormer: tokens by region, whose mean queries and keys choose regions, for all heads together."""
    data = vectors("biformer")
    (rows, columns), (batch, height, width, *_) = data["regions"].tolist(), data["query"].shape

    def by_region(x):
        x = x.reshape(batch, rows, height // rows, columns, width // columns, *x.shape[3:])
        return x.swapaxes(2, 3).reshape(batch, height * width, *x.shape[5:])

    size = height * width // (rows * columns)
    sizes = {"query_block": size, "key_block": size}
    data |= {name: by_region(x) for name, x in data.items() if np.shape(x)[:3] == (batch, height, width)}

    def lists(query, key, **_):
        together = [x.reshape(batch, -1, 1, x.shape[2] * x.shape[3]) for x in (query, key)]
        return block_selection.pooled_blocks(*together, **sizes, count=data["topk"], first=0, is_causal=False)

    def attend(given):
        options = {**sizes, "scale": data["scale"], "return_lse": True}
        return A.block_sparse_attention(**given, blocks=lists(**given), **options)

    with jax.enable_x64(True):
        chosen = lists(data["query"], data["key"])[:, 0]
    np.testing.assert_array_equal(chosen, np.sort(data["region_lists"], -1))
    assert_attention(attend, data)


_rng = np.random.default_rng(0)  # float32 where jax_enable_x64 is off
BATCH, QUERIES, KEYS, HEADS, KEY_HEADS = 2, 19, 23, 4, 2
QUERY = _rng.normal(size=(BATCH, QUERIES, HEADS, 8))
KEY, VALUE = _rng.normal(size=(BATCH, KEYS, KEY_HEADS, 8)), _rng.normal(size=(BATCH, KEYS, KEY_HEADS, 5))
SIZES = [(1, 1), (1, 16), (3, 4), (4, 3), (16, 1), (16, 16), (4, 1)]


@pytest.mark.parametrize("sizes", slow_but([(3, 4), (4, 1)], SIZES), ids=str)
@pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
def test_equals_dense_attention_under_its_mask(form, sizes):
    """Values, lse and all gradients, with repeated blocks, such as there are not, and rows without any."""
    (query_block, key_block), places = sizes, 3
    query_blocks, key_blocks = -(-QUERIES // query_block), -(-KEYS // key_block)
    rng = np.random.default_rng(1)
    blocks = rng.integers(-2, key_blocks + 2, size=(BATCH, KEY_HEADS, query_blocks, places))
    blocks[:, 0, 0] = -1

    def dense(query, key, value):
        listed = (blocks[..., None] == np.arange(key_blocks)).any(-2)
        mask = listed.repeat(query_block, 2).repeat(key_block, 3).repeat(HEADS // KEY_HEADS, 1)
        return A.dot_product_attention(
            query, key, value, mask=mask[:, :, :QUERIES, :KEYS], return_lse=True, implementation="reference"
        )

    def sparse(query, key, value):
        return A.block_sparse_attention(
            query,
            key,
            value,
            blocks,
            query_block=query_block,
            key_block=key_block,
            return_lse=True,
            implementation=form,
        )

    def loss(function, arrays):
        out, lse = function(*arrays)
        return (jnp.sin(out)).sum() + jnp.where(jnp.isfinite(lse), jnp.cos(lse), 0).sum(), (out, lse)

    with jax.enable_x64(True):
        arrays = tuple(map(jnp.asarray, (QUERY, KEY, VALUE)))
        got, want = (jax.jit(jax.grad(functools.partial(loss, f), has_aux=True))(arrays) for f in (sparse, dense))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)


def test_all_blocks_are_full_attention_and_places_do_not_matter():
    lists = np.tile(np.arange(6), (1, 1, 5, 1))
    call = jax.jit(functools.partial(A.block_sparse_attention, query_block=4, key_block=4))
    out = call(QUERY, KEY, VALUE, lists)
    np.testing.assert_allclose(out, A.dot_product_attention(QUERY, KEY, VALUE), atol=2e-6)
    np.testing.assert_allclose(out, call(QUERY, KEY, VALUE, lists[..., ::-1]), atol=2e-6)
    bias = np.random.default_rng(2).normal(size=lists.shape)
    biased = call(QUERY, KEY, VALUE, lists, block_bias=bias)
    np.testing.assert_allclose(biased, call(QUERY, KEY, VALUE, lists[..., ::-1], block_bias=bias[..., ::-1]), atol=2e-6)
    assert np.abs(biased - out).max() > 0.1


MASKS = {
    "window": A.masks.window(6, 2),
    "power_blocks": A.masks.causal() & A.masks.power_blocks(3),
    "not block_causal": ~A.masks.block_causal(5, prefix=2),
}


@pytest.mark.parametrize("name", slow_but(["power_blocks"], MASKS))
@pytest.mark.long
def test_a_mask_is_the_tiles_that_it_visits(name):
    mask = MASKS[name]
    visited = A.masks.block_map(mask, (QUERIES,), (4,), (3,), (KEYS,)).visited
    assert not visited.all()
    lists = block_selection.lists_of(visited[None, None])
    out = A.block_sparse_attention(QUERY, KEY, VALUE, lists, query_block=4, key_block=3, mask=mask)
    dense = A.dot_product_attention(QUERY, KEY, VALUE, mask=A.masks.dense_mask(mask, (QUERIES,), (KEYS,))[None, None])
    np.testing.assert_allclose(out, dense, atol=2e-6)


@pytest.mark.long
def test_the_bias_alone_gets_a_gradient_where_it_counts():
    data = vectors("causal_bias")

    def loss(bias):
        out = A.block_sparse_attention(
            data["query"],
            data["key"],
            data["value"],
            data["blocks"],
            query_block=1,
            key_block=4,
            block_bias=bias,
            is_causal=True,
        )
        return (out**2).sum()

    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(loss)(data["block_bias"]))
        check_grads(jax.jit(loss), (data["block_bias"],), 1, modes=["rev"], atol=1e-7, rtol=1e-7)
    assert (gradient[data["blocks"] < 0] == 0).all()
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_of_minus_infinity_hides_its_block(form):
    """As if the block were not listed, in values and gradients; of all blocks, as if the query saw none."""
    lists = np.tile(np.arange(6), (BATCH, KEY_HEADS, 5, 1))
    bias = np.random.default_rng(6).normal(size=lists.shape)
    hidden = np.random.default_rng(7).random(lists.shape) < 0.4
    hidden[:, 1, 2] = True

    def results(lists, bias):
        def loss(arrays):
            *arrays, bias = arrays
            sizes = {"query_block": 4, "key_block": 4, "return_lse": True, "implementation": form}
            out, lse = A.block_sparse_attention(*arrays, lists, block_bias=bias, **sizes)
            return jnp.sin(out).sum() + jnp.where(jnp.isfinite(lse), jnp.cos(lse), 0).sum(), (out, lse)

        return jax.jit(jax.grad(loss, has_aux=True))((QUERY, KEY, VALUE, bias))

    with jax.enable_x64(True):
        got, want = results(lists, np.where(hidden, -np.inf, bias)), results(np.where(hidden, -1, lists), bias)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


NOTHING = {
    "no places": ({"blocks": np.zeros((1, 1, 5, 0), int)}, KEYS),
    "no places of every head": (
        {
            "blocks": np.zeros((BATCH, HEADS, 5, 0), int),
            "block_bias": np.zeros((1, HEADS, 5, 0)),
            "is_causal": True,
            "mask": A.masks.window(5, 5),
            "segment_ids": (np.zeros((BATCH, QUERIES), int), np.zeros((BATCH, KEYS), int)),
        },
        KEYS,
    ),
    "no keys": ({"blocks": np.zeros((1, KEY_HEADS, 5, 2), int), "mask": A.masks.causal()}, 0),
    "neither": ({"blocks": np.zeros((1, 1, 5, 0), int)}, 0),
}


@pytest.mark.parametrize("form", slow_but(["xla"], FORMS))
@pytest.mark.parametrize("case", NOTHING)
def test_lists_or_keys_that_are_empty_show_nothing(case, form):
    options, keys = NOTHING[case]

    def loss(arrays):
        sizes = {"query_block": 4, "key_block": 4, "return_lse": True, "implementation": form}
        out, lse = A.block_sparse_attention(*arrays, **options, **sizes)
        return out.sum(), (out, lse)

    gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))((QUERY, KEY[:, :keys], VALUE[:, :keys]))
    np.testing.assert_array_equal(out, np.zeros((BATCH, QUERIES, HEADS, 5)))
    np.testing.assert_array_equal(lse, np.full((BATCH, QUERIES, HEADS), -np.inf))
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_what_lists_nothing_gives_lists_that_are_served():
    """A mask of no pair, a count of 0, and keys that there are none of."""
    nothing = A.masks.block_map(~A.masks.window(99, 99), (QUERIES,), (4,), (4,), (KEYS,)).visited
    pooled = functools.partial(block_selection.pooled_blocks, QUERY, query_block=4, key_block=4)
    for lists, keys in (
        (block_selection.lists_of(nothing[None, None]), KEYS),
        (pooled(KEY, count=0, is_causal=False), KEYS),
        (pooled(KEY[:, :0], count=2), 0),
        (pooled(KEY[:, :0], count=2, is_causal=False), 0),
        (
            block_selection.tree_blocks(QUERY[:, ::4, None], KEY[:, :0], 2, key_block=4, candidates=np.zeros(5, int)),
            0,
        ),
    ):
        out = A.block_sparse_attention(QUERY, KEY[:, :keys], VALUE[:, :keys], lists, query_block=4, key_block=4)
        np.testing.assert_array_equal(out, 0)
    lse = np.zeros(QUERY.shape[:3])
    for reduce in ("max", "sum", "mean"):
        statistics = A.block_statistics(QUERY, KEY[:, :0], lse, query_block=4, key_block=4, reduce=reduce)
        assert statistics.shape == (BATCH, HEADS, 5, 0)


def test_a_kernel_refuses_lists_without_places():
    shapes = [jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)] * 3
    call = functools.partial(A.block_sparse_attention, query_block=128, key_block=128)
    lists = np.zeros((1, 1, 2, 0), int)
    with pytest.raises(ValueError, match=r"implementation: 'pallas_tpu' cannot serve .* lists that are not empty"):
        jax.eval_shape(lambda *arrays: call(*arrays, lists, implementation="pallas_tpu"), *shapes)
    (choice,) = A.explain(call, *shapes, lists)
    assert "not empty" in choice.refused["pallas_tpu"]


@pytest.mark.long
def test_memory_is_linear_at_equal_places():
    """Temporary memory of the compiled gradient: twice for twice the tokens, at 8 places a block."""

    def temporary(length):
        shapes = [jax.ShapeDtypeStruct((1, length, n, 32), jnp.float32) for n in (4, 2, 2)]
        lists = jax.ShapeDtypeStruct((1, 2, length // 64, 8), jnp.int32)

        def loss(arrays, lists):
            return (A.block_sparse_attention(*arrays, lists, query_block=64, key_block=64) ** 2).sum()

        return jax.jit(jax.grad(loss)).lower(shapes, lists).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16384) < 2.2 * temporary(8192)


SIZES = [
    {"query_block": q, "key_block": k, "count": count}
    for q, k, count in itertools.product((1, 4, 8), (1, 2, 4), (2, 3))
]
RULES = ("first of the means", "means", "tree", "gate", "tree of groups", "gate of groups", "gate, turned")
CUTS = [(1, 2, 3, 12, 19), (19,)]


def gate(heads, key_heads, head_dim):
    random = np.random.default_rng(5)
    return random.normal(size=(heads, head_dim, 3)), random.normal(size=(key_heads, 3 * head_dim, 3))


def turn(x, positions):
    """The first two channels, by an angle that grows with position."""
    angle = 0.3 * positions[..., None]
    first, second = x[..., 0], x[..., 1]
    turned = [first * jnp.cos(angle) - second * jnp.sin(angle), first * jnp.sin(angle) + second * jnp.cos(angle)]
    return jnp.concatenate([jnp.stack(turned, -1), x[..., 2:]], -1)


def deciding(rule, query, key):
    """(options of a step, what its cache is made for)."""
    heads, key_heads, head_dim = query.shape[2], *key.shape[2:]
    of_all = {"list_heads": heads, "representative_dim": 3}
    return {
        "first of the means": ({"first": 1}, {}),
        "means": ({"rule": "mean", "first": 0}, {}),
        "tree": ({"rule": "tree"}, of_all | {"representative_dim": 0}),
        "gate": ({"rule": gate(heads, key_heads, head_dim), "first": 1}, of_all),
        "gate, turned": ({"rule": (*gate(heads, key_heads, head_dim), turn), "first": 1}, of_all),
        "tree of groups": ({"rule": "tree"}, {"representative_dim": 0}),
        "gate of groups": ({"rule": gate(key_heads, key_heads, head_dim), "first": 1}, {"representative_dim": 3}),
    }[rule]


def strict_lists(rule, query, key, *, query_block, key_block, count):
    """What the rule lists of a whole sequence, own blocks among it."""
    if rule in ("first of the means", "means"):
        sizes = {"query_block": query_block, "key_block": key_block}
        return block_selection.pooled_blocks(query, key, **sizes, count=count, first=int(rule != "means"))
    queries = block_selection.pool_blocks(query, query_block, "first")
    if rule.endswith("of groups"):
        queries = queries.reshape(*queries.shape[:2], key.shape[2], -1, queries.shape[-1]).mean(3)
    key_blocks = -(-key.shape[1] // key_block)
    complete, own = block_selection.causal_blocks(queries.shape[1], key_blocks, query_block, key_block)
    if rule.startswith("gate"):
        turns = None
        if rule == "gate, turned":
            starts = [jnp.arange(0, key.shape[1], size)[None] for size in (query_block, key_block)]
            queries, key = turn(queries, -starts[0]), turn(key, -jnp.arange(key.shape[1])[None])
            turns = tuple(functools.partial(turn, positions=positions) for positions in starts)
        scores = block_selection.gate_scores(
            queries, block_selection.gate_keys(key, key_block), *gate(queries.shape[2], *key.shape[2:]), turns=turns
        )
        return block_selection.select_blocks(scores, eligible=complete, count=count, first=1, own=own)
    found = block_selection.tree_blocks(
        queries[:, :, None], key, count, key_block=key_block, candidates=complete.sum(-1)
    )
    besides = block_selection.lists_of(own)
    return np.concatenate([found, np.broadcast_to(besides, (*found.shape[:-1], besides.shape[-1]))], -1)


@pytest.mark.parametrize("cuts", slow_but([CUTS[0]], CUTS), ids=str)
@pytest.mark.parametrize("number", slow_but([8], range(len(SIZES))))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.long
def test_decoding_is_the_parallel_form_however_it_is_cut(rule, number, cuts):
    sizes = SIZES[number]
    blocks = {"query_block": sizes["query_block"], "key_block": sizes["key_block"]}
    key, value = KEY[:, :QUERIES], VALUE[:, :QUERIES]
    options, kept = deciding(rule, QUERY, key)
    with jax.enable_x64(True):
        lists = strict_lists(rule, QUERY, key, **sizes)
        want = A.block_sparse_attention(QUERY, key, value, lists, **blocks, is_causal=True)
        cache = A.init_block_sparse_cache(
            BATCH,
            QUERIES,
            KEY_HEADS,
            8,
            key_block=sizes["key_block"],
            count=sizes["count"],
            **kept,
            value_dim=5,
            dtype="float64",
        )
        step = functools.partial(A.block_sparse_step, query_block=sizes["query_block"], **options)
        outs = []
        for start, end in itertools.pairwise((0, *cuts)):
            out, cache = step(cache, *(x[:, start:end] for x in (QUERY, key, value)))
            outs.append(out)
        np.testing.assert_allclose(np.concatenate(outs, 1), want, atol=1e-12)
        slots = cache.key.shape[1]
        out, _ = step(cache, *(x[:, : slots - QUERIES + 1] for x in (QUERY, key, value)))
        assert np.isnan(out[:, -1]).all()
        assert np.isfinite(out[:, :-1]).all()


def test_vectors_of_a_gate_for_groups_token_by_token():
    """SeerAttention-R: the lists and the steps of the mean query of each group."""
    data = vectors("gate_strict")
    rule = data["weight_query"], data["weight_key"]
    assert rule[0].shape[0] == data["key"].shape[2] < data["query"].shape[2]
    block, length = data["key_block"], data["key"].shape[1]
    complete, own = block_selection.causal_blocks(length, -(-length // block), 1, block)
    with jax.enable_x64(True):
        scores = block_selection.gate_scores(data["query"], block_selection.gate_keys(data["key"], block), *rule)
        np.testing.assert_allclose(np.where(complete, scores, 0), data["scores"], atol=1e-12)
        lists = block_selection.select_blocks(scores, eligible=complete, count=data["count"], own=own)
        np.testing.assert_array_equal(lists, data["blocks"])
        cache = A.init_block_sparse_cache(
            1, length, 2, 8, key_block=block, count=data["count"], representative_dim=6, dtype="float64"
        )
        tokens = (data[name] for name in ("query", "key", "value"))
        out, _ = A.block_sparse_step(cache, *tokens, query_block=1, rule=rule, first=0)
        np.testing.assert_allclose(out, data["out"], atol=1e-9)


@pytest.mark.parametrize("number", slow_but([8], range(len(SIZES))))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.long
def test_a_prompt_leaves_what_steps_leave(rule, number):
    sizes, arrays = SIZES[number], prompts.ARRAYS
    options, kept = deciding(rule, arrays["query"], arrays["key"])
    options["query_block"] = sizes["query_block"]
    with jax.enable_x64(True):
        cache = A.init_block_sparse_cache(
            prompts.BATCH,
            13,
            prompts.KEY_HEADS,
            prompts.HEAD_DIM,
            **kept,
            value_dim=prompts.VALUE_DIM,
            dtype="float64",
            key_block=sizes["key_block"],
            count=sizes["count"],
        )
        prompts.assert_leaves_what_steps_leave(
            cache,
            functools.partial(A.prefill_block_sparse_cache, **options),
            functools.partial(A.block_sparse_step, **options),
            arrays,
            tolerance_of_copies=1e-12 if rule.startswith("gate") else 0,
        )


def test_a_step_is_for_the_cache_that_was_made_for_its_rule():
    now = (QUERY[:, :1], KEY[:, :1], VALUE[:, :1])
    sizes = {"key_block": 2, "count": 2, "value_dim": 5}
    made = {
        name: A.init_block_sparse_cache(BATCH, 8, KEY_HEADS, 8, **sizes, **deciding(name, QUERY, KEY)[1])
        for name in ("means", "tree", "gate")
    }
    for (cache_of, cache), rule in itertools.product(made.items(), made):
        step = functools.partial(A.block_sparse_step, query_block=1, **deciding(rule, QUERY, KEY)[0])
        if cache_of == rule:
            jax.eval_shape(step, cache, *now)
            continue
        with pytest.raises(ValueError, match=r"cache: got one of list_heads=.*; the rule needs list_heads="):
            jax.eval_shape(step, cache, *now)
    weights = gate(HEADS, KEY_HEADS, 8)
    for options, message in [
        ({"rule": "tree", "first": 1}, "first: got 1; a tree has none"),
        ({"rule": "median"}, "rule: got 'median'; need one of mean, tree"),
        ({"rule": weights[:1]}, 'rule: got .*; need "mean", "tree", or the two weights of a gate'),
        ({"rule": (weights[0], weights[1][:, :8])}, r"rule\[1\]: got .*3 head_dim"),
        ({"rule": (weights[0][:3], weights[1])}, r"rule\[0\]: got .*; need 4 heads or 2"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            A.block_sparse_step(made["tree"], *now, query_block=1, **options)
    with pytest.raises(ValueError, match="list_heads: got 3; need a multiple of num_key_heads, 2"):
        A.init_block_sparse_cache(BATCH, 8, KEY_HEADS, 8, **sizes, list_heads=3)


@pytest.mark.parametrize("name", ["statistics"])
def test_statistics(name):
    data = vectors(name)
    sizes = {"query_block": data["query_block"], "key_block": data["key_block"], "is_causal": data["is_causal"]}
    with jax.enable_x64(True):
        _, lse = A.dot_product_attention(
            data["query"], data["key"], data["key"], is_causal=data["is_causal"], return_lse=True
        )
        for reduce in ("max", "sum", "mean"):
            got = A.block_statistics(data["query"], data["key"], lse, reduce=reduce, **sizes)
            np.testing.assert_allclose(got, data[f"block_{reduce}"], atol=1e-12)
        total = A.block_statistics(data["query"], data["key"], lse, reduce="sum", **sizes).sum(-1)
        rows = np.minimum(data["query_block"], lse.shape[1] - np.arange(0, lse.shape[1], data["query_block"]))
        np.testing.assert_allclose(total, np.broadcast_to(rows, total.shape), atol=1e-12)  # every query's weights are 1

        def loss(query):
            return A.block_statistics(query, data["key"], lse, reduce="sum", **sizes).sum()

        assert (np.asarray(jax.grad(loss)(data["query"])) == 0).all()


def test_a_dynamic_mask_is_a_list_and_a_bias_for_each_token():
    """DMA (Shi et al. 2025): the keys of the largest bias among those a token may see, and the bias on their logits."""
    data = vectors("dynamic_mask")
    batch, length, key_heads, _ = data["key"].shape
    causal = np.tri(length, dtype=bool)

    def loss(given):
        gates = jax.nn.softplus(given["value"].reshape(batch, length, -1) @ given["weight"])
        bias = jnp.exp(given["a"] * gates).swapaxes(1, 2)[:, :, None]
        scores = jnp.broadcast_to(bias, (batch, key_heads, length, length))
        lists = A.block_selection.select_blocks(scores, eligible=causal, count=data["width"])
        places = jnp.take_along_axis(scores, jnp.maximum(lists, 0), -1)
        tokens = (given[name] for name in ("query", "key", "value"))
        out, lse = A.block_sparse_attention(
            *tokens, lists, query_block=1, key_block=1, block_bias=places, is_causal=True, return_lse=True
        )
        return (out * data["cotangent_out"]).sum(), (bias, lists, out, lse)

    with jax.enable_x64(True):
        given = {name: data[name] for name in ("query", "key", "value", "weight", "a")}
        gradients, (bias, lists, out, lse) = jax.jit(jax.grad(loss, has_aux=True))(given)
        np.testing.assert_allclose(bias, data["key_bias"], atol=1e-12)
        np.testing.assert_array_equal(A.block_selection.block_mask_of(lists, length), data["visible"])
        np.testing.assert_allclose(out, data["out"], atol=1e-12)
        np.testing.assert_allclose(lse, data["lse"], atol=1e-12)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, data[f"grad_{name}"], atol=1e-10, err_msg=name)
