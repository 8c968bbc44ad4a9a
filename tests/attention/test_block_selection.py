"""Lists of blocks: the published vectors, ties, counts and gradients. Their strictness: test_strict_selection.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from vector_files import assert_attention, vectors

import attnlab as A
from attnlab.attention import block_selection as selection


@pytest.fixture(autouse=True, scope="module")
def _wide():
    with jax.enable_x64(True):
        yield


def test_vectors_of_selection_with_exact_ties():
    data = vectors("select")
    causal = {"eligible": data["eligible"], "first": data["first"], "own": data["own"]}
    np.testing.assert_array_equal(
        selection.select_blocks(data["scores"], count=data["count"], **causal), data["blocks_count"]
    )
    limited = {"count": data["count_threshold"], "threshold": data["threshold"]}
    np.testing.assert_array_equal(
        selection.select_blocks(data["scores"], **limited, **causal), data["blocks_threshold"]
    )
    every = np.ones_like(data["eligible"])
    np.testing.assert_array_equal(
        selection.select_blocks(data["scores"], eligible=every, count=data["count"]), data["blocks_not_causal"]
    )


@pytest.mark.long
def test_vectors_of_strict_pooled_lists():
    data = vectors("strict")
    query_block, key_block = data["query_block"], data["key_block"]
    queries = selection.pool_blocks(data["query"], query_block, "first")
    scores = selection.pooled_scores(queries, selection.pool_blocks(data["key"], key_block, "mean"))
    np.testing.assert_allclose(scores, data["scores"], atol=1e-12)
    complete, own = selection.causal_blocks(*scores.shape[2:], query_block, key_block)
    lists = selection.select_blocks(scores, eligible=complete, count=data["count"], first=data["first"], own=own)
    np.testing.assert_array_equal(lists, data["blocks"])


@pytest.mark.long
def test_vectors_of_frames_then_blocks_inside_them():
    """Light Forcing: the best frames beside the forced ones, and of their blocks the best."""
    data = vectors("frames")
    per_frame = np.bincount(data["frame_of_block"])[0]
    queries = selection.pool_blocks(data["query"], data["block"], "mean")
    keys, frames = (selection.pool_blocks(data["key"], size * data["block"], "mean") for size in (1, per_frame))
    forced = np.isin(np.arange(frames.shape[1]), data["forced_frames"])[None]
    scores = selection.pooled_scores(queries, frames)
    lists = selection.select_blocks(scores, eligible=~forced, count=data["frames"], own=forced)
    chosen = selection.block_mask_of(lists, frames.shape[1])
    np.testing.assert_array_equal(chosen, data["chosen_frames"])
    eligible = jnp.repeat(chosen, per_frame, axis=-1)
    blocks = selection.select_blocks(selection.pooled_scores(queries, keys), eligible=eligible, count=data["count"])
    np.testing.assert_array_equal(blocks, data["blocks"])


def test_vectors_of_sparsities_of_chunks():
    """Light Forcing: over all pairs of a query and a key they come to the target, and the first chunk sees all."""
    data = vectors("frames")
    options = {name: data[name] for name in ("target", "base")}
    sparsities, beta = selection.chunk_sparsities(
        data["chunk_tokens"].tolist(), **options, alphas=data["alphas"].tolist()
    )
    np.testing.assert_allclose(sparsities, data["sparsities"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(beta, data["beta"], rtol=0, atol=1e-12)
    tokens = np.array([4, 1, 7, 3])
    sparsities, _ = selection.chunk_sparsities(tokens.tolist(), **options, alphas=(5.0, 1.0, 0.6, 0.2))
    pairs = np.array([(query, key) for query in range(4) for key in range(query + 1)])
    counts = tokens[pairs[:, 0]] * tokens[pairs[:, 1]]
    np.testing.assert_allclose((counts * sparsities[pairs[:, 0]]).sum(), data["target"] * counts.sum(), rtol=1e-12)
    assert sparsities[0] == 0
    assert (np.diff(sparsities) > 0).all()


@pytest.mark.long
def test_vectors_of_the_tree():
    data = vectors("tree_published")
    rows = data["query"].reshape(-1, data["query_block"], 8)[:, 1::2]
    ends = (np.arange(len(rows)) + 1) * data["query_block"] // data["key_block"]
    count = data["mask_k"] // data["key_block"]
    published = {"key_block": data["key_block"], "candidates": ends, "representative": "block"}
    found = selection.tree_blocks(rows[None, :, :, None], data["key"][None, :, None], count, **published)
    np.testing.assert_array_equal(found[0, 0], data["blocks"])

    data = vectors("tree_strict")
    queries, keys = data["query"].shape[1], -(-data["key"].shape[1] // data["key_block"])
    complete, own = selection.causal_blocks(queries, keys, 1, data["key_block"])
    found = selection.tree_blocks(
        data["query"][:, :, None], data["key"], data["count"], key_block=data["key_block"], candidates=complete.sum(-1)
    )
    first = np.arange(keys)[None] == 0
    chosen = selection.block_mask_of(found, keys) | (own | first)[None, None]
    np.testing.assert_array_equal(selection.lists_of(chosen, data["blocks"].shape[-1]), data["blocks"])


@pytest.mark.long
def test_vectors_of_the_gate_and_its_training():
    """The gate learns from what attention does."""
    data = vectors("gate_published")
    block = data["key_block"]
    _, lse = A.dot_product_attention(data["query"], data["key"], data["key"], is_causal=True, return_lse=True)
    largest = A.block_statistics(
        data["query"], data["key"], lse, query_block=block, key_block=block, reduce="max", is_causal=True
    )
    targets = largest / largest.sum(-1, keepdims=True)
    np.testing.assert_allclose(targets, data["targets"], atol=1e-12)
    queries = selection.pool_blocks(data["query"], block, "mean")
    keys = jnp.concatenate([selection.pool_blocks(data["key"], block, kind) for kind in ("mean", "max", "min")], -1)

    def loss(query_weights, key_weights):
        return selection.gate_loss(queries, keys, query_weights, key_weights, largest, eligible=data["eligible"])

    kl, gradients = jax.value_and_grad(loss, argnums=(0, 1))(data["weight_query"], data["weight_key"])
    np.testing.assert_allclose(kl, data["kl"], atol=1e-12)
    for got, name in zip(gradients, ("grad_weight_query", "grad_weight_key")):
        np.testing.assert_allclose(got, data[name], atol=1e-12)


def test_vectors_of_what_a_gate_for_groups_learns():
    """SeerAttention-R's targets: of a group's heads the largest weight of each block."""
    data = vectors("gate_strict")
    block = data["key_block"]
    _, lse = A.dot_product_attention(data["query"], data["key"], data["key"], is_causal=True, return_lse=True)
    sizes = {"query_block": 1, "key_block": block, "is_causal": True}
    largest = A.block_statistics(data["query"], data["key"], lse, **sizes, reduce="max")
    keys, weights = selection.gate_keys(data["key"], block), (data["weight_query"], data["weight_key"])
    got = selection.gate_loss(data["query"], keys, *weights, largest, eligible=data["eligible"])
    targets, scores = data["targets"], np.where(data["eligible"], data["scores"], -np.inf)
    has_row = data["eligible"].any(-1)
    of_gate = (scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True))[:, :, has_row]
    targets = targets[:, :, has_row]
    terms = np.where(targets > 0, targets * (np.log(np.where(targets > 0, targets, 1)) - of_gate), 0)
    np.testing.assert_allclose(got, terms.sum(-1).mean(), atol=1e-12)


@pytest.mark.long
def test_vectors_of_a_strict_gate():
    """Queries of a group averaged, complete blocks compete, and a row's targets are over these alone."""
    data = vectors("gate_strict")
    sizes = {size: data[size] for size in ("query_block", "key_block")}
    batch, length, heads, head_dim = data["query"].shape
    key_heads = data["key"].shape[2]
    averaged = data["query"].reshape(batch, length, key_heads, heads // key_heads, head_dim).mean(3)
    queries = selection.pool_blocks(averaged, data["query_block"], "first")
    keys = selection.gate_keys(data["key"], data["key_block"])
    scores = selection.gate_scores(queries, keys, data["weight_query"], data["weight_key"])
    complete, own = selection.causal_blocks(*scores.shape[2:], *sizes.values())
    np.testing.assert_array_equal(complete, data["eligible"])
    np.testing.assert_allclose(np.where(complete, scores, 0), data["scores"], atol=1e-12)
    lists = selection.select_blocks(scores, eligible=complete, count=data["count"], own=own)
    np.testing.assert_array_equal(lists, data["blocks"])
    _, lse = A.dot_product_attention(data["query"], data["key"], data["key"], is_causal=True, return_lse=True)
    largest = A.block_statistics(data["query"], data["key"], lse, **sizes, reduce="max", is_causal=True)
    largest = np.where(complete, largest, 0).reshape(batch, key_heads, -1, *complete.shape).max(2)
    total = largest.sum(-1, keepdims=True)
    np.testing.assert_allclose(largest / np.where(total > 0, total, 1), data["targets"], atol=1e-12)


@pytest.mark.parametrize("name", ["connectivity", "chunks"])
def test_vectors_of_attention_to_what_is_chosen(name):
    """Which tokens these are, the tests of maps and of chunks compare."""
    data = vectors(name)
    lists = selection.lists_of(data["visible"])
    sizes = {"query_block": 1, "key_block": 1, "return_lse": True}
    assert_attention(lambda given: A.block_sparse_attention(**given, blocks=lists, **sizes), data)


@pytest.mark.long
def test_a_gate_and_its_model_learn_from_losses_of_their_own():
    """The model's queries and keys get nothing of the gate's loss, and the gate nothing of the model's."""
    weights = np.random.default_rng(4).normal(size=(2, 2, 8, 6))
    complete, own = selection.causal_blocks(TOKENS // 4, TOKENS // 4, 4, 4)
    sizes = {"query_block": 4, "key_block": 4}

    @jax.jit
    def gradients(query, key, value, *weights):
        def losses(query, key, value, *weights):
            queries, keys = selection.pool_blocks(query[:, :, ::2], 4, "first"), selection.pool_blocks(key, 4, "mean")
            _, lse = A.dot_product_attention(query[:, :, ::2], key, value, is_causal=True, return_lse=True)
            largest = A.block_statistics(query[:, :, ::2], key, lse, **sizes, reduce="max", is_causal=True)
            of_gate = selection.gate_loss(queries, keys, *weights, largest, eligible=complete)
            scores = selection.gate_scores(queries, keys, *weights)
            lists = selection.select_blocks(scores, eligible=complete, count=2, own=own)
            out = A.block_sparse_attention(query[:, :, ::2], key, value, lists, **sizes, is_causal=True)
            return of_gate, jnp.sum(jnp.sin(out))

        given = query, key, value, *weights
        return [jax.grad(lambda *x, number=number: losses(*x)[number], tuple(range(5)))(*given) for number in range(2)]

    of_gate, of_model = gradients(QUERY, KEY, OTHER_KEY, *weights)
    assert [bool(jnp.any(gradient != 0)) for gradient in of_gate] == [False, False, False, True, True]
    assert [bool(jnp.any(gradient != 0)) for gradient in of_model] == [True, True, True, False, False]


@pytest.mark.long
def test_rows_without_a_block_to_choose_have_nothing_to_learn():
    rng = np.random.default_rng(5)
    pooled, weights = rng.normal(size=(2, 1, 3, 2, 4)), rng.normal(size=(2, 2, 4, 5))
    statistics = rng.uniform(size=(1, 2, 3, 3))
    eligible = np.tri(3, k=-1, dtype=bool)
    got = selection.gate_loss(*pooled, *weights, statistics, eligible=eligible)
    rest = selection.gate_loss(pooled[0][:, 1:], pooled[1], *weights, statistics[:, :, 1:], eligible=eligible[1:])
    np.testing.assert_allclose(got, rest, rtol=1e-12)
    assert np.isfinite(got)


def test_vectors_of_learned_maps():
    data = vectors("connectivity")
    queries, keys = (data[name] @ data[f"weight_{name}"] + data[f"bias_{name}"] for name in ("query", "key"))
    sizes = {"coefficients": data["coef_topk"], "threshold": data["basis_threshold"], "scale": data["predictor_scale"]}

    def scores(queries, keys, down, up):
        return selection.connectivity_scores(queries, keys, down, up, **sizes)

    given = queries, keys, data["down"], data["up"]
    approximate = jax.jit(scores)(*given)
    np.testing.assert_allclose(approximate, data["approximate"], atol=1e-12)
    check_grads(jax.jit(lambda *given: jnp.sin(scores(*given))), given, 1, modes=["rev"], atol=1e-6, rtol=1e-6)
    # A budget of keys, but for the first row; in blocks of one token.
    length = queries.shape[1]
    lists = selection.select_blocks(approximate, eligible=np.ones((1, 1), bool), count=data["budget"])
    visible = np.array(selection.block_mask_of(lists, length))
    visible[:, :, 0] = True
    np.testing.assert_array_equal(visible, data["visible"])


@pytest.mark.long
def test_vectors_of_chunks():
    data = vectors("chunks")
    scores = selection.chunk_scores(data["query"], data["key"], data["starts"])
    known = np.isfinite(data["chunk_scores"])
    np.testing.assert_allclose(np.where(known, scores[0], 0), np.where(known, data["chunk_scores"], 0), atol=1e-12)
    # Tokens of the best chunks that end before the recent ones: blocks of one key, by their chunk's score.
    length = data["query"].shape[1]
    chunk = np.searchsorted(data["starts"], np.arange(length), side="right") - 1
    ends = np.append(data["starts"][1:], length)[chunk]
    now = np.arange(length)[:, None]
    recent, first = (np.arange(length) > now - data["recent"]), np.arange(length) < data["first"]
    forced = (recent | first) & (np.arange(length) <= now)
    eligible = (ends <= now - data["recent"] + 1) & ~forced
    left = data["budget"] - forced.sum(-1)
    seen = forced.copy()
    for count in np.unique(left):
        rows = left == count
        lists = selection.select_blocks(
            scores[:, None][:, :, rows][..., chunk], eligible=eligible[rows], count=int(count)
        )
        seen[rows] |= np.asarray(selection.block_mask_of(lists, length))[0, 0]
    np.testing.assert_array_equal(seen, data["visible"][0, 0])


def test_vectors_of_masks():
    data, masks = vectors("masks") | vectors("radial"), A.masks
    compared = {
        "block_diffusion_12_4": masks.block_diffusion(12, 4),
        "window_14_left5_right2": masks.window(5, 2),
        "block_causal_14_size4": masks.block_causal(4),
        "block_causal_15_size4_prefix5": masks.block_causal(4, prefix=5),
        "inward_3x5x6_radius1_2": masks.neighborhood((3, 5, 6), (3, 3, 5)),
        "radial_5frames_150tokens": masks.radial(150),
        "radial_9frames_130tokens_decay_half": masks.radial(130, decay_factor=0.5),
    }
    for name, mask in compared.items():
        shape = (3, 5, 6) if name.startswith("inward") else data[name].shape[:1]
        got = jax.jit(functools.partial(masks.dense_mask, mask, shape))()
        np.testing.assert_array_equal(got, data[name], err_msg=name)
    # HiDiffusion's windows: a roll, windows side by side, and a roll back.
    cyclic = "cyclic_windows_8x12_window4x6_shift1x3"
    tokens = np.roll(np.arange(96).reshape(8, 12), (-1, -3), (0, 1)).ravel()  # at each place
    windows = masks.neighborhood((8, 12), (4, 6), stride=(4, 6))
    got = jax.jit(functools.partial(masks.dense_mask, windows, (8, 12)))()
    np.testing.assert_array_equal(got, data[cyclic][np.ix_(tokens, tokens)])
    assert {*compared, cyclic} == set(data)


# --- Orders -----------------------------------------------------------------------------------------------------------

SPACE, ORDERS = (2, 3, 4), [(2, 0, 1), (0, 1, 2)]


def test_an_order_of_axes_is_the_grid_transposed_and_back():
    index, inverse = selection.axis_order(SPACE, ORDERS)
    places = np.empty((2, 24), int)
    for frame, row, column in np.ndindex(SPACE):
        token = (frame * 3 + row) * 4 + column
        places[:, token] = (column * 2 + frame) * 3 + row, token
    np.testing.assert_array_equal(inverse, places)
    np.testing.assert_array_equal(np.take_along_axis(index, places, 1), np.broadcast_to(np.arange(24), (2, 24)))
    x = np.arange(24.0)[None, :, None, None] + np.zeros((1, 1, 4, 1))
    moved = np.asarray(selection.in_order(x, index))
    np.testing.assert_array_equal(moved[0, :, :, 0].T, index.repeat(2, 0))
    np.testing.assert_array_equal(selection.in_order(moved, inverse), x)


def test_attention_does_not_depend_on_the_order_of_its_tokens():
    """PARO: all that is dense is as it was; what a few blocks see is not."""
    index, inverse = selection.axis_order((4, 8), [(1, 0), (0, 1)])
    tokens = QUERY, KEY, OTHER_KEY
    moved = [selection.in_order(x, index) for x in tokens]
    want = A.dot_product_attention(*tokens)
    np.testing.assert_allclose(selection.in_order(A.dot_product_attention(*moved), inverse), want, atol=1e-12)
    sizes = {"query_block": 4, "key_block": 4}
    every = selection.lists_of(np.ones((1, 1, 8, 8), bool))
    of_all = A.block_sparse_attention(*moved, every, **sizes)
    np.testing.assert_allclose(selection.in_order(of_all, inverse), want, atol=1e-12)
    few = selection.lists_of(np.eye(8, dtype=bool)[None, None])
    of_few = selection.in_order(A.block_sparse_attention(*moved, few, **sizes), inverse)
    place = inverse // 4
    mask = (place[:, :, None] == place[:, None]).repeat(2, 0)[None]
    np.testing.assert_allclose(of_few, A.dot_product_attention(*tokens, mask=mask), atol=1e-12)
    assert np.abs(of_few - A.block_sparse_attention(*tokens, few, **sizes))[:, :, :2].max() > 0.1


def test_a_head_that_follows_columns_needs_fewer_blocks_in_their_order():
    """By the sums of weights over blocks, as PARO chooses a head's order: one block of eight has nearly all."""
    rng = np.random.default_rng(6)
    of_columns = np.tile(4 * rng.normal(size=(1, 1, 8, 1, 8)), (1, 8, 1, 1, 1)).reshape(1, 64, 1, 8)
    needed = {}
    for order in [(0, 1), (1, 0)]:
        index, _ = selection.axis_order((8, 8), [order])
        x = selection.in_order(of_columns, index)
        _, lse = A.dot_product_attention(x, x, x, return_lse=True)
        sums = A.block_statistics(x, x, lse, query_block=8, key_block=8, reduce="sum")
        shares = np.sort(np.asarray(sums) / 8, axis=-1)[..., ::-1].cumsum(-1)
        needed[order] = int((shares < 0.95).sum(-1).max()) + 1
    assert needed == {(0, 1): 8, (1, 0): 1}


# --- Properties -------------------------------------------------------------------------------------------------------

SCORES = np.random.default_rng(0).normal(size=(2, 3, 6, 6))


def lists(**options):
    return np.asarray(selection.select_blocks(SCORES, **{"eligible": np.tri(6, k=-1, dtype=bool), **options}))


def test_no_more_are_listed_than_may_compete_and_none_twice():
    for count in (0, 2, 6, 9):
        got = lists(count=count)
        assert got.shape[-1] == count
        for row in range(6):
            listed = got[:, :, row][got[:, :, row] >= 0]
            assert (listed < row).all()
            assert (np.sum(got[:, :, row] >= 0, -1) == min(count, row)).all()
    assert (lists(count=3, eligible=np.zeros((6, 6), bool)) == -1).all()


def test_lists_of_few_bits_count_further_than_these():
    got = np.asarray(selection.block_mask_of(np.array([[5, -1, 127]], np.int8), 300))
    np.testing.assert_array_equal(np.flatnonzero(got), [5, 127])


def test_more_places_list_a_superset():
    previous = np.zeros((2, 3, 6, 6), bool)
    for count in range(7):
        now = np.asarray(selection.block_mask_of(jnp.asarray(lists(count=count, first=2)), 6))
        assert (now | ~previous).all()
        previous = now


@pytest.mark.long
def test_mass_lists_until_it_is_reached():
    eligible = np.tri(6, k=-1, dtype=bool)
    assert (lists(mass=0.0, eligible=eligible) == -1).all()
    np.testing.assert_array_equal(lists(mass=1.0), lists())
    weights = np.where(eligible, np.exp(SCORES), 0)
    shares = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    got = np.asarray(selection.block_mask_of(jnp.asarray(lists(mass=0.7)), 6))
    kept = np.where(got, shares, 0)
    assert (kept.sum(-1)[..., 1:] >= 0.7 - 1e-12).all()
    least = np.where(got, shares, np.inf).min(-1)[..., 1:]
    assert (kept.sum(-1)[..., 1:] - least < 0.7).all()  # without the last one it was not


def test_first_blocks_are_taken_before_better_ones():
    got = lists(count=2, first=2)
    np.testing.assert_array_equal(got[..., 3:, :], np.broadcast_to([0, 1], (2, 3, 3, 2)))
    np.testing.assert_array_equal(got, lists(count=2, first=3))  # no more than count


@pytest.mark.long
@pytest.mark.parametrize(("candidates", "count"), [(32, 2), (29, 3)])
@pytest.mark.long
def test_a_tree_finds_what_begins_a_child_of_the_first_level(candidates, count):
    ends = np.arange(count + 1) * candidates // count
    children = np.sort(np.concatenate([ends[:-1], ends[:-1] + np.diff(ends) // 2]))
    key = np.random.default_rng(1).normal(size=(len(children), candidates, 1, 8)) * 0.01
    key[np.arange(len(children)), children] = 5
    query = np.ones((len(children), 1, 1, 1, 8))
    found = selection.tree_blocks(query, key, count, key_block=1, candidates=np.array([candidates]))
    assert (np.asarray(found)[:, 0, 0] == children[:, None]).any(-1).all()


def test_a_tree_takes_the_earliest_of_equal_scores_and_all_where_there_are_few():
    key, query = np.random.default_rng(1).normal(size=(1, 32, 1, 8)), np.ones((1, 1, 1, 1, 8))
    same = selection.tree_blocks(query, np.ones_like(key), 2, key_block=1, candidates=np.array([32]))
    np.testing.assert_array_equal(np.asarray(same)[0, 0, 0], [0, 1])
    few = selection.tree_blocks(query, key, 4, key_block=8, candidates=np.array([3]))
    np.testing.assert_array_equal(np.asarray(few)[0, 0, 0], [0, 1, 2, -1])


def test_a_tree_s_candidates_may_be_arrays_and_differ_by_row():
    """Of any number of candidates the search is that of a number known when traced."""
    random = np.random.default_rng(2)
    query, key = random.normal(size=(9, 1, 1, 4, 8)), random.normal(size=(9, 17, 2, 8))
    search = functools.partial(selection.tree_blocks, count=2, key_block=2)
    got = jax.jit(lambda candidates: search(query, key, candidates=candidates))(jnp.arange(9)[:, None])
    for row, found in enumerate(got):
        known = search(query[row : row + 1], key[row : row + 1], candidates=np.array([row]))
        np.testing.assert_array_equal(found, known[0])
        assert (np.asarray(found) < row).all()
        assert ((np.asarray(found) >= 0).sum(-1) == min(row, 2)).all()


BATCH, TOKENS = 2, 32
_rng = np.random.default_rng(3)
QUERY = _rng.normal(size=(BATCH, TOKENS, 4, 8))
KEY, OTHER_KEY = _rng.normal(size=(2, BATCH, TOKENS, 2, 8))


@pytest.mark.long
def test_lists_of_a_first_step_are_those_of_its_mean_weights():
    """SparseD: chosen once, by the mean weight that a block gets, and given to later steps, whose tokens are others."""
    query, key, later = QUERY[:, :, ::2], KEY, OTHER_KEY
    sizes = {"query_block": 8, "key_block": 4}
    _, lse = A.dot_product_attention(query, key, key, return_lse=True)
    shares = A.block_statistics(query, key, lse, **sizes, reduce="mean")
    lists = selection.select_blocks(shares, eligible=np.ones((1, 1), bool), count=3)
    weights = np.exp(np.einsum("BTNH,BSNH->BNTS", query, key) / np.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    means = weights.reshape(BATCH, 2, TOKENS // 8, 8, TOKENS // 4, 4).mean((3, 5))
    np.testing.assert_array_equal(lists, np.sort(np.argsort(-means, -1)[..., :3], -1))
    out = A.block_sparse_attention(query, later, later, lists, **sizes)
    seen = np.asarray(selection.block_mask_of(lists, TOKENS // 4)).repeat(8, 2).repeat(4, 3)
    np.testing.assert_allclose(out, A.dot_product_attention(query, later, later, mask=seen), atol=1e-12)


@pytest.mark.slow
def test_vectors_of_what_is_rectified():
    """Rectified SpaAttn: all that follows from the chosen blocks."""
    data = vectors("rectified")
    size = data["block"]
    with jax.enable_x64(True):
        means = [selection.pool_blocks(jnp.asarray(data[name]), size, "mean") for name in ("query", "key", "value")]
        probabilities = jax.nn.softmax(selection.pooled_scores(*means[:2]), axis=-1)
        np.testing.assert_allclose(probabilities, data["block_probabilities"], atol=1e-14)
        gain = selection.pooling_gain(data["query"], data["key"], query_block=size, key_block=size)
        np.testing.assert_array_equal(gain, data["gain"])
        lists, tokens = selection.lists_of(data["chosen"]), [data[name] for name in ("query", "key", "value")]
        sizes = {"query_block": size, "key_block": size}
        sparse, lse = A.block_sparse_attention(*tokens, lists, **sizes, return_lse=True)
        np.testing.assert_allclose(sparse, data["sparse_out"], atol=1e-12)
        np.testing.assert_allclose(lse, data["sparse_lse"], atol=1e-12)
        out = selection.rectify(sparse, probabilities, data["chosen"], gain, means[2], query_block=size)
        np.testing.assert_allclose(out, data["out"], atol=1e-12)


def test_nothing_is_rectified_where_all_is_chosen_or_gains_nothing():
    """And where none is chosen it is attention to means, over the tokens that there are."""
    probabilities = np.float32([[[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]]])
    out, values = np.ones((1, 5, 1, 2), np.float32), np.arange(6, dtype=np.float32).reshape(1, 3, 1, 2)
    none, every = np.zeros((1, 1), bool), np.ones((1, 1), bool)
    call = functools.partial(selection.rectify, out, probabilities, values=values, query_block=4)
    np.testing.assert_array_equal(call(chosen=every, gain=every), out)
    np.testing.assert_array_equal(call(chosen=none, gain=none), out)
    np.testing.assert_array_equal(call(chosen=none, gain=every)[0, :, 0], [[1.5, 2.5]] * 4 + [[2, 3]])
    with pytest.raises(ValueError, match=r"probabilities: got float32\[1,1,2,3\]; need"):
        call(chosen=none, gain=none, query_block=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: selection.causal_blocks(4, 4, 3, 2), "query_block: got 3; need one of it and key_block, 2, to divide"),
        (lambda: selection.select_blocks(SCORES, eligible=np.ones((2, 2), bool)), "eligible: got bool"),
        (lambda: selection.select_blocks(SCORES, eligible=np.ones((6, 6))), "eligible: got float64"),
        (lambda: lists(count=1, mass=0.5, threshold=0.1), "threshold: got 0.1; give mass or threshold, not both"),
        (lambda: lists(mass=1.5), "mass: got 1.5"),
        (lambda: selection.pool_blocks(KEY, 4, "median"), "kind: got 'median'; need one of mean, max"),
        (lambda: selection.tree_blocks(QUERY[:, :, None], KEY, 0, key_block=4, candidates=np.zeros(32, int)), "count"),
        (
            lambda: selection.tree_blocks(
                np.ones((3, 1, 1, 1, 2)), np.ones((3, 4, 1, 2)), 1, key_block=2, candidates=jnp.ones((2, 1), int)
            ),
            r"candidates: got int.*need batch 1 or queries",
        ),
        (lambda: jax.jit(selection.lists_of)(np.ones((2, 2), bool)), "width: got None; need an int"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("blocks", [1, 13, 32])
def test_ranks_are_alike_compared_and_sorted(blocks, monkeypatch):
    rng = np.random.default_rng(blocks)
    scores = rng.choice([-np.inf, -1.5, -0.0, 0.0, 2.0, np.inf, np.nan], size=(6, blocks)).astype(np.float32)
    group = rng.integers(3, size=scores.shape).astype(np.int32)
    falling = np.where(np.isnan(scores), np.inf, -scores)
    want = np.lexsort((np.broadcast_to(np.arange(blocks), scores.shape), falling, np.isnan(scores), group), axis=-1)
    for most in (0, blocks):
        monkeypatch.setattr(selection, "_COMPARED", most)
        ranks = jax.jit(lambda *arrays: selection._ranks(*arrays))(group, scores)
        np.testing.assert_array_equal(np.argsort(ranks, axis=-1), want)
