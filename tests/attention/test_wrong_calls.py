"""Every parameter of every public function with one wrong value: served, or refused in one line that names it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from right_calls import FUNCTIONS, IN_MODULES, function_of, right_call

import attnlab as A


class _Odd:
    pass


def _values():
    yield from (None, 0, -1, 10**12, 2.5, float("nan"), float("inf"), True, "x", b"x", _Odd(), jnp.int32)
    yield from (np.int64(2), np.int64(-3), np.float32(2), np.float32("nan"), np.bool_(True))
    yield from ((), (1, 2, 3, 4), [None], {})


def _wrong(right):
    if isinstance(right, np.ndarray):
        yield from (None, "x", 2.0, right.tolist(), right[..., 0], right[None], right.take([], axis=-1))
        yield from (right.astype(kind) for kind in (np.complex64, np.int32, bool, np.float32, object))
        for axis, length in enumerate(right.shape):
            yield right.take(np.arange(length + 1) % length, axis=axis)
            yield right.take([0], axis=axis)
        return
    yield from _values()
    if hasattr(right, "_fields"):
        yield type(right)(*(leaf[:-1] if getattr(leaf, "ndim", 0) else leaf for leaf in right))
    elif isinstance(right, list):
        yield right[:1]


_QUICK = {"local_attention", "linear_step", "init_routing_cache"} | IN_MODULES


@pytest.mark.parametrize("name", slow_but(_QUICK, sorted(FUNCTIONS | IN_MODULES)))
@pytest.mark.long
def test_a_wrong_value_is_refused_in_one_line_that_names_it(name):
    right = right_call(name)

    def called(arguments):
        """For its shapes alone; a mask has none."""
        jax.eval_shape(lambda: (function_of(name)(**arguments), 0)[1])

    called(right)
    refused, wrong = 0, []
    for parameter, value in right.items():
        for other in _wrong(value):
            given = f"{parameter}={_text(other)}"
            try:
                with warnings.catch_warnings(action="ignore"):
                    called({**right, parameter: other})
            except (ValueError, TypeError) as error:
                refused += 1
                # Two arrays that do not fit each other: either may be the one that is named.
                is_array = hasattr(other, "ndim") or hasattr(other, "_fields")
                names = list(right) if is_array else [parameter]
                if "\n" in str(error) or not any(one in str(error) for one in names):
                    wrong.append(f"{given}: {error}")
            except Exception as error:
                wrong.append(f"{given}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(line[:200] for line in wrong)
    assert refused > 5 * len(right)


def _batched(name):
    return [x for x in ("query", "queries", "key", "keys", "values", "statistics", "out") if x in right_call(name)]


@pytest.mark.parametrize("name", [name for name in sorted(IN_MODULES) if len(_batched(name)) > 1])
def test_a_batch_is_not_broadcast(name):
    right = right_call(name)
    for parameter in _batched(name):
        with pytest.raises(ValueError, match=rf"^({'|'.join(right)}): got "):
            function_of(name)(**{**right, parameter: right[parameter][:1]})


def _refused(name, message, **wrong):
    return pytest.param(lambda: function_of(name)(**{**right_call(name), **wrong}), message, id=f"{name}, {message}")


_CAUSAL = A.masks.causal()
_FEW = ~(A.masks.kinds([0, 1], {0: _CAUSAL}) | A.masks.first_keys(1))  # labels of fewer keys than there are
_CHUNKS, _TREE, _LEVELS = (f"block_selection.{name}" for name in ("chunk_scores", "tree_blocks", "pooled_levels"))
# Each would be served, and what it gives be wrong; or refused without the argument's name.
REFUSED = [
    _refused(_CHUNKS, "starts: got dtype float32; need an integer dtype", starts=jnp.array([0.0, 3.0])),
    _refused(_CHUNKS, "starts: got [5, 0]; need numbers from 0 to 6 that do not fall", starts=np.array([5, 0])),
    _refused(_CHUNKS, "starts: got [5, 0]; need numbers from 0 to 6 that do not fall", starts=jnp.array([5, 0])),
    _refused(_CHUNKS, "starts: got [0, 7]; need numbers from 0 to 6", starts=np.array([0, 7], np.uint8)),
    _refused(_TREE, "candidates: got dtype float64; need an integer dtype", candidates=np.arange(3.0)),
    _refused(_TREE, "candidates: got -1; need 0 to 2", candidates=np.array([0, -1, 2])),
    _refused(_TREE, "candidates: got 3; need 0 to 2", candidates=jnp.array([0, 1, 3])),
    _refused(_LEVELS, "sizes: got (1, 3); need divisors of key_block, 4", sizes=(1, 3)),
    _refused(_LEVELS, "query: got float32[6,0,4,8]; need at least one token", query=np.ones((6, 0, 4, 8), np.float32)),
    _refused("block_selection.block_mask_of", "blocks: got list; need an array", blocks=[[1, 2]]),
    _refused("block_selection.pool_blocks", "x: got dtype int32; need a floating", x=np.ones((1, 4, 1, 2), np.int32)),
    _refused("masks.kinds", "labels: got float64[2]; need integers", labels=[0.0, 1.0]),
    _refused("masks.kinds", "by_kind: got {}; need at least one kind", by_kind={}),
    _refused("masks.block_causal", "size: got 0; need 1 to 2147483647", size=0),
    _refused("masks.block_causal", "size: got -2; need 1 to 2147483647", size=-2),
    _refused("masks.block_diffusion", "size: got 0; need 1 to 2147483647", size=0),
    _refused("masks.power_blocks", "size: got 0; need 1 to 2147483647", size=0),
    _refused("masks.window", "left: got -3; need at least 0", left=-3),
    _refused("masks.neighborhood", "window: got 7; at most 6 fits the shape (6,)", window=7, dilation=1),
    _refused("masks.block_map", "query_tile: got (0,); need at least 1", query_tile=(0,)),
    *(
        _refused(name, f"mask: got {given}", mask=mask)
        for name in ("masks.dense_mask", "masks.block_map", "block_sparse_attention", "block_statistics")
        for given, mask in (
            ("bool[6,6]; need a masks.Mask of one axis", np.ones((6, 6), bool)),
            ("one that raises IndexError for tokens of one axis; need a masks", A.masks.causal(axis=1)),
            ("one that raises ValueError for tokens of one axis; need a masks", A.masks.neighborhood((6, 6), 3)),
            ("one with labels of 2 keys; need labels of all ", _FEW),
        )
    ),
    _refused("dot_product_attention", "mask: got one with labels of 2 keys; need labels of all 6", mask=_FEW),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_would_be_served_wrongly_is_refused(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value).startswith(message)


def test_values_that_are_not_known_are_not_asked_for():
    """Traced ones, whatever they are."""
    right, wrong = right_call(_CHUNKS), np.array([5, 0])
    jax.eval_shape(lambda starts: A.block_selection.chunk_scores(**{**right, "starts": starts}), wrong)
    right, wrong = right_call(_TREE), np.array([0, -1, 7])
    jax.eval_shape(lambda candidates: A.block_selection.tree_blocks(**{**right, "candidates": candidates}), wrong)


def test_a_mask_of_jax_s_arrays_is_served():
    of_arrays = A.masks.Mask(lambda query, key: key[0].at[...].add(0) <= query[0])
    np.testing.assert_array_equal(A.masks.dense_mask(of_arrays, (5,)), np.tri(5, dtype=bool))


@pytest.mark.parametrize("keys", [6, 8])
def test_labels_may_be_of_more_keys(keys):
    mask = A.masks.kinds(np.arange(8) % 2, {0: A.masks.causal()})
    seen = np.asarray(A.masks.dense_mask(mask, (3,), (keys,)))
    np.testing.assert_array_equal(seen, np.tri(3, keys, dtype=bool) & (np.arange(keys) % 2 == 0))


def _text(value):
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
