"""Blocks that a gate, a tree or learned maps choose: what trains these. The mixers' suite has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import attnlab
from attnlab import nn
from attnlab.attention import block_selection as selection

X = np.random.default_rng(0).normal(size=(2, 12, 16)).astype(np.float32)
SIZES = {"query_block": 2, "key_block": 4}
LEARNING = {
    "gate, causal": nn.GateBlockAttention(16, is_causal=True, **SIZES, count=1),
    "gate": nn.GateBlockAttention(16, is_causal=False, **SIZES, count=1),
    "gate of groups": nn.GateBlockAttention(16, is_causal=True, **SIZES, count=1, num_key_heads=2),
    "connectivity": nn.ConnectivityAttention(16, is_causal=False, tokens=12, count=3, maps=4),
}
CHOOSING = {"query_gate", "key_gate", "down", "up"}


def losses(mixer, values):
    """Of the model, by its output, and of what chooses."""
    bound = nn.bind(mixer, values)
    out = bound(X, is_training=True)
    return jnp.square(out).sum(), nn.learned(bound)[1]


@pytest.mark.long
@pytest.mark.parametrize("mixer", LEARNING.values(), ids=LEARNING)
def test_what_chooses_learns_from_its_own_loss_and_nothing_else_does(mixer):
    values = nn.initialize(mixer, jax.random.key(0))
    of_model, of_choice = jax.jit(jax.jacrev(lambda values: losses(mixer, values)))(values)
    for name, gradients in ((name, (of_model[name], of_choice[name])) for name in values):
        model, choice = (any(np.any(x != 0) for x in jax.tree.leaves(gradient)) for gradient in gradients)
        assert (model, choice) == ((False, True) if name in CHOOSING else (True, False)), name


@pytest.mark.parametrize("mixer", LEARNING.values(), ids=LEARNING)
def test_what_chooses_comes_to_expect_what_attention_does(mixer):
    """Its loss, which is no less than 0, falls to under half of what it was."""
    values = nn.initialize(mixer, jax.random.key(0))
    chosen = {name: values[name] for name in values if name in CHOOSING}
    optimizer = optax.adam(3e-2)

    @jax.jit
    def trained(chosen):
        def step(state, _):
            chosen, moments = state
            loss, gradients = jax.value_and_grad(lambda chosen: losses(mixer, values | chosen)[1])(chosen)
            updates, moments = optimizer.update(gradients, moments)
            return (optax.apply_updates(chosen, updates), moments), loss

        return jax.lax.scan(step, (chosen, optimizer.init(chosen)), None, length=200)[1]

    trace = trained(chosen)
    assert trace[-1] < trace[0] / 2
    assert trace.min() > -1e-6


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        (nn.GateBlockAttention, {"is_causal": True, **SIZES, "count": 3}),
        (nn.TreeBlockAttention, {"is_causal": True, **SIZES, "count": 3}),
        (nn.ConnectivityAttention, {"is_causal": False, "tokens": 12, "count": 12, "maps": 2}),
    ],
)
def test_of_all_keys_it_is_softmax_attention(mixer, options):
    dense, mixer = nn.SoftmaxAttention(16, is_causal=options["is_causal"]), mixer(16, **options)
    values = nn.initialize(mixer, jax.random.key(0))
    expected = nn.bind(dense, nn.initialize(dense, jax.random.key(0)))(X)
    np.testing.assert_allclose(nn.bind(mixer, values)(X), expected, atol=1e-5)


def test_flops_count_the_choice():
    projections = 4 * 2 * 12 * 16 * 16
    # Rows of 2 queries; 3 blocks of 4 keys; queries see 1 complete block, where there is one, and their own.
    pairs = sum(min(t // 4, 1) * 4 + t % 4 + 1 for t in range(12))
    seen = 4 * pairs * 16
    gate = nn.GateBlockAttention(16, is_causal=True, **SIZES, count=1, gate_dim=6)
    by_gate = 2 * 6 * (6 * 16 + 3 * 48) + 2 * 6 * 4 * 6 * 3  # projections of queries and keys, then their products
    assert gate.flops((12,)) == projections + seen + by_gate
    tree = nn.TreeBlockAttention(16, is_causal=True, **SIZES, count=1)
    assert tree.flops((12,)) == projections + seen + 2 * 6 * 16 * 3  # of 3 blocks one is found by 2 halvings
    maps = nn.ConnectivityAttention(16, is_causal=False, tokens=12, count=3, maps=4)
    by_maps = 2 * 4 * 12 * 16 + 2 * 4 * 12 * 16 + 2 * 4 * 4 * 12 * 12  # keys by maps, queries by them, sums of maps
    assert maps.flops((12,)) == projections + 4 * 12 * 3 * 16 + by_maps


def scores_of_gate(mixer, x, monkeypatch):
    """What it chooses by, [B, N | K, query blocks, key blocks]."""
    bound, seen, select = nn.bind(mixer, nn.initialize(mixer, jax.random.key(0))), [], selection.select_blocks
    monkeypatch.setattr(
        selection, "select_blocks", lambda scores, **options: seen.append(scores) or select(scores, **options)
    )
    bound(x)
    (scores,) = seen
    return bound, np.asarray(scores)


@pytest.mark.parametrize("per", ["group", "head"])
def test_a_gate_turns_what_it_makes_of_blocks_by_their_starts(per, monkeypatch):
    """By loops, of the queries and keys before their rotary positions."""
    mixer = nn.GateBlockAttention(16, is_causal=True, **SIZES, count=1, num_key_heads=2, gate_dim=4, per=per)
    bound, scores = scores_of_gate(mixer, X, monkeypatch)
    query, key = (np.asarray(layer(X), np.float64) for layer in (bound.query, bound.key))
    query = query if per == "head" else query.reshape(2, 12, 2, 2, 4).mean(3)
    weights = [np.asarray(x[...], np.float64) for x in (bound.query_gate, bound.key_gate)]

    def turned(x, position):
        """Pairs of channels, as complex numbers, at frequencies 1 and 10000^-1/2."""
        pairs = (x[:2] + 1j * x[2:]) * np.exp(1j * position * np.array([1, 0.01]))
        return np.concatenate([pairs.real, pairs.imag])

    for row, head, i, j in np.ndindex(2, query.shape[2], 6, 3):
        of = head * 2 // query.shape[2]
        block = key[row, 4 * j : 4 * j + 4, of]
        pooled = np.concatenate([block.mean(0), block.max(0), block.min(0)])
        want = turned(query[row, 2 * i, head] @ weights[0][head], 2 * i) @ turned(pooled @ weights[1][of], 4 * j) / 2
        np.testing.assert_allclose(scores[row, head, i, j], want, atol=1e-5)


def test_a_gate_s_scores_depend_on_how_far_apart_blocks_are(monkeypatch):
    """Not on where: after 8 other tokens, all scores between blocks are what they were."""
    mixer = nn.GateBlockAttention(16, is_causal=True, **SIZES, count=1)
    _, scores = scores_of_gate(mixer, X, monkeypatch)
    monkeypatch.undo()
    _, later = scores_of_gate(mixer, np.concatenate([X[::-1, :8], X], axis=1), monkeypatch)
    np.testing.assert_allclose(later[:, :, 4:, 2:], scores, atol=1e-5)
    monkeypatch.undo()
    _, of_equal = scores_of_gate(mixer, np.repeat(X[:, :1], 12, axis=1), monkeypatch)
    assert np.abs(np.diff(of_equal, axis=-1)).max() > 1e-3


def test_a_gate_s_width_has_pairs_to_turn():
    mixer = nn.GateBlockAttention(16, is_causal=False, **SIZES, count=1, gate_dim=6)
    bound = nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))
    with pytest.raises(ValueError, match="gate_dim: got 6; rotary positions on 2 axes need a multiple of 4"):
        bound(X.reshape(2, 3, 4, 16))


@pytest.mark.parametrize(
    ("mixer", "options", "is_taken"),
    [
        (nn.GateBlockAttention, {}, True),
        (nn.GateBlockAttention, {"per": "head"}, False),
        (nn.TreeBlockAttention, {}, True),
        (nn.BlockSparseAttention, {}, True),
    ],
)
def test_lists_that_serve_a_group_are_those_that_kernels_take(mixer, options, is_taken):
    sizes = {"query_block": 128, "key_block": 128, "count": 1, "num_key_heads": 2, "head_dim": 64}
    mixer = mixer(16, is_causal=True, **sizes, **options)
    bound = nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))
    choices = attnlab.explain(bound, np.zeros((1, 512, 16), np.float32))
    (choice,) = (x for x in choices if x.primitive == "block_sparse_attention")
    assert (choice.by_platform.get("tpu") == "pallas_tpu") == is_taken


def test_inputs_have_the_length_that_maps_are_of():
    mixer = nn.ConnectivityAttention(16, is_causal=False, tokens=9, count=3, maps=4)
    with pytest.raises(ValueError, match="tokens: got 9; need the input's 12"):
        nn.bind(mixer, nn.initialize(mixer, jax.random.key(0)))(X)
