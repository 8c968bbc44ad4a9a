"""Blocks that a gate, a tree or learned maps choose: what trains these. The mixers' suite has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import attnlab
from attnlab import nn

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
    gate = nn.GateBlockAttention(16, is_causal=True, **SIZES, count=1, gate_dim=5)
    by_gate = 2 * 5 * (6 * 16 + 3 * 48) + 2 * 5 * 4 * 6 * 3  # projections of queries and keys, then their products
    assert gate.flops((12,)) == projections + seen + by_gate
    tree = nn.TreeBlockAttention(16, is_causal=True, **SIZES, count=1)
    assert tree.flops((12,)) == projections + seen + 2 * 6 * 16 * 3  # of 3 blocks one is found by 2 halvings
    maps = nn.ConnectivityAttention(16, is_causal=False, tokens=12, count=3, maps=4)
    by_maps = 2 * 4 * 12 * 16 + 2 * 4 * 12 * 16 + 2 * 4 * 4 * 12 * 12  # keys by maps, queries by them, sums of maps
    assert maps.flops((12,)) == projections + 4 * 12 * 3 * 16 + by_maps


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
