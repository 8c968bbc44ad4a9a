"""Every parameter of every public function with one wrong value: served, or refused in one line that names it."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from right_calls import FUNCTIONS, right_call

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
        return
    yield from _values()
    if hasattr(right, "_fields"):
        yield type(right)(*(leaf[:-1] if getattr(leaf, "ndim", 0) else leaf for leaf in right))
    elif isinstance(right, list):
        yield right[:1]


@pytest.mark.parametrize("name", slow_but({"local_attention", "linear_step", "init_routing_cache"}, sorted(FUNCTIONS)))
@pytest.mark.long
def test_a_wrong_value_is_refused_in_one_line_that_names_it(name):
    function, right = getattr(A, name), right_call(name)
    jax.eval_shape(functools.partial(function, **right))
    refused, wrong = 0, []
    for parameter, value in right.items():
        for other in _wrong(value):
            given = f"{parameter}={_text(other)}"
            try:
                with warnings.catch_warnings(action="ignore"):
                    jax.eval_shape(functools.partial(function, **{**right, parameter: other}))
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


def _text(value):
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)
