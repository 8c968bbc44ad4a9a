"""Whether a mixer of one's own sees later tokens: it would train well, and be compared, without a word.

Of a task that says who sees whom, whether it sees what that pattern hides.

The library's own are not looked at here: tests hold all of them to it, and the one that is published as not causal says
so. So their runs pay nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import nn
from attnlab.errors import UserError
from attnlab.models.blocks import Stack
from attnlab.train.tasks.base import Task
from attnlab.train.tasks.language import LanguageTask

# Of a longer sequence its beginning is read, where the mixer takes one.
_MOST_TOKENS = 512
_CUTS = 6


def check_causality(model: nnx.Module, task: Task) -> None:
    """Raises UserError where a causal model has a mixer from outside attnlab whose outputs later tokens change, or,
    where the task gives a pattern, tokens that it hides.

    It is read at its initial values, in evaluation: what buffers learn of a batch in training is of all its tokens. A
    task that probes for a leak itself reports it, and is let pass.
    """
    probes = isinstance(task, LanguageTask) and task.probe_future
    if not (isinstance(model, Stack) and model.is_causal) or probes:
        return
    mixers = [block.mixer for block in model.layers[: model.period]]
    own = [mixer for mixer in mixers if type(mixer).__module__.partition(".")[0] != "attnlab"]
    if not own or (length := task.costs(model)["length"]) is None:
        return
    if (pattern := getattr(task, "pattern", None)) is not None:
        for mixer in own:
            if (leak := find_hidden(mixer, pattern, length)) is not None:
                told = f"its output at position {leak[0]} changes with that at {leak[1]}; mend its mix_masked"
                raise UserError(f"mixers: {type(mixer).__name__} sees tokens that the task's pattern hides: {told}")
        return
    for mixer in own:
        if (leak := find_leak(mixer, length)) is not None:
            told = f"its output at position {leak[0]} changes with the tokens from {leak[1]} on; mend its mix"
            if isinstance(task, LanguageTask):
                told += ", or let --gin.LanguageTask.probe_future=True measure what it gives"
            raise UserError(f"mixers: {type(mixer).__name__} is to be causal and sees later tokens: {told}")


def find_leak(mixer: nn.Attention, length: int) -> tuple[int, int] | None:
    """(a position, a later one) such that the output at the first changes with the tokens from the second on, by more
    than rounding; None: there is none.

    Several such second positions are tried, one in the middle and others where bounds of chunks seldom are.
    """

    def mixed(values: nn.Parameters, x: jax.Array) -> jax.Array:
        return nn.bind(mixer, values)(x)

    values = nn.initialize(mixer, jax.random.key(0))
    if (short := _shortened(length)) < length:
        try:
            jax.eval_shape(mixed, values, _drawn(mixer, 0, short))
            length = short
        except Exception:  # it is made for the whole length alone
            pass
    x, other, program = _drawn(mixer, 0, length), _drawn(mixer, 1, length), jax.jit(mixed)
    own = np.asarray(program(values, x), np.float32)[0]
    tolerance = _tolerance(mixer, own)
    for cut in sorted({*np.linspace(1, length - 1, _CUTS).astype(int).tolist(), length // 2} - {0, length}):
        changed = np.asarray(program(values, jnp.concatenate([x[:, :cut], other[:, cut:]], axis=1)), np.float32)[0]
        moved = np.flatnonzero(np.abs(changed - own)[:cut].max(axis=-1) > tolerance)
        if moved.size:
            return int(moved[0]), cut
    return None


def find_hidden(mixer: nn.Attention, pattern: nn.Pattern, length: int) -> tuple[int, int] | None:
    """(a query, a key that the pattern hides from it) such that hidden keys change the output, by more than rounding;
    None: there is none. Several queries are tried, each against all keys that it does not see."""
    tokens = np.arange(length if pattern.positions is None else len(pattern.positions))
    sees = pattern.mask.sees((tokens[:, None],), (tokens[None],))
    x, other = (_drawn(mixer, seed, len(tokens)) for seed in (0, 1))
    values = nn.initialize(mixer, jax.random.key(0))
    program = jax.jit(lambda values, x: nn.bind(mixer, values)(x, pattern=pattern))
    own = np.asarray(program(values, x), np.float32)[0]
    for query in sorted(set(np.linspace(0, len(tokens) - 1, 2 * _CUTS).astype(int).tolist())):
        changed = np.asarray(program(values, jnp.where(sees[query][None, :, None], x, other)), np.float32)[0]
        if np.abs(changed - own)[query].max() > _tolerance(mixer, own):
            return query, int(np.flatnonzero(~sees[query])[0])
    return None


def _drawn(mixer: nn.Attention, seed: int, length: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (1, length, mixer.features)).astype(mixer.dtype)


def _tolerance(mixer: nn.Attention, own: np.ndarray) -> float:
    """Not every form of a causal mechanism is so to the last bit: one may subtract a maximum over all keys."""
    return float(jnp.finfo(mixer.dtype).eps) ** 0.5 * float(np.abs(own).max())


def _shortened(length: int) -> int:
    while length > _MOST_TOKENS:
        length //= 2
    return length
