"""Times beside other libraries on a CPU, side by side in one run: `python -m attnlab.peers [--only NAME] [--length N]`.

Peers are used where they are installed: PyTorch 2.9 (its SDPA, FlexAttention and torch.compile, which needs a C++
compiler: CXX=g++) and jax-linear-attention 0.1 (Python 3.12 or later). float32, one sequence, medians of interleaved
runs, so that whatever else the machine does slows both sides alike.
"""

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attnlab
from attnlab import data, models, nn, train
from attnlab.train import step as steps
from attnlab.train.memory import keep_freed_memory
from attnlab.train.mesh import placed

Call = Callable[[], Any]

_SIZES = ((4, 64), (8, 128))  # heads, head_dim
_WINDOW, _AGENTS, _BLOCK = 256, 16, 128
# nanoGPT's setting for a CPU.
_VOCABULARY, _FEATURES, _DEPTH, _HEADS, _TOKENS, _BATCH = 65, 128, 4, 4, 64, 12


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m attnlab.peers", description="Times beside other libraries, on a CPU."
    )
    parser.add_argument("--only", nargs="+", choices=list(_PAIRS), default=list(_PAIRS))
    parser.add_argument("--length", type=int, default=8192, help="tokens (default 8192)")
    parser.add_argument("--runs", type=int, default=9, help="runs of each side (default 9)")
    parser.add_argument("--workdir", type=Path, help="folder to write peers.md to")
    given = parser.parse_args()
    lines = ["| what | attnlab, ms | peer | ms | attnlab / peer |", "| --- | ---: | --- | ---: | ---: |"]
    print(*lines, sep="\n")
    for name in given.only:
        try:
            for label, peer, own, other in _PAIRS[name](given.length):
                ours, theirs = interleaved([own, other], given.runs)
                lines.append(f"| {label} | {ours:.1f} | {peer} | {theirs:.1f} | {ours / theirs:.2f} |")
                print(lines[-1], flush=True)
        except ImportError as error:
            lines.append(f"| {name} | | missing: {error.name} | | |")
            print(lines[-1], flush=True)
    if given.workdir is not None:
        given.workdir.mkdir(parents=True, exist_ok=True)
        title = f"# attnlab {attnlab.__version__} beside other libraries, jax {jax.__version__}, {given.runs} runs each"
        (given.workdir / "peers.md").write_text("\n".join([title, "", *lines]) + "\n")


def interleaved(calls: list[Call], runs: int) -> list[float]:
    """The median milliseconds of each call, in turn `runs` times after one that is not counted."""
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [1e3 * statistics.median(times) for times in seconds]


def _jitted(function: Callable[..., jax.Array], *arrays: jax.Array, gradients: bool = False) -> Call:
    if gradients:
        numbers = tuple(range(len(arrays)))
        run: Any = jax.jit(jax.value_and_grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays))), argnums=numbers))
    else:
        run = jax.jit(function)
    return lambda: jax.block_until_ready(run(*arrays))


def _tokens(length: int, heads: int, head_dim: int, count: int = 3) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(key, (1, length, heads, head_dim)) for key in keys]


def _torch() -> Any:
    torch = importlib.import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch


Pairs = Iterator[tuple[str, str, Call, Call]]


def _dense(length: int) -> Pairs:
    """Softmax attention beside scaled_dot_product_attention."""
    torch = _torch()
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def attend(*arrays: jax.Array) -> jax.Array:
        return attnlab.dot_product_attention(*arrays, is_causal=True)

    for heads, head_dim in _SIZES:
        arrays = _tokens(length, heads, head_dim)
        tensors = [torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays]

        def forward(tensors: Any = tensors) -> None:
            with torch.no_grad():
                sdpa(*tensors, is_causal=True)

        def backward(tensors: Any = tensors) -> None:
            leaves = [x.detach().requires_grad_() for x in tensors]
            torch.sin(sdpa(*leaves, is_causal=True)).sum().backward()

        label = f"dense causal, {heads} x {head_dim}"
        yield label, "PyTorch SDPA", _jitted(attend, *arrays), forward
        yield f"{label}, with gradients", "PyTorch SDPA", _jitted(attend, *arrays, gradients=True), backward


def _window(length: int) -> Pairs:
    """A causal window beside FlexAttention, compiled."""
    torch = _torch()
    flex = importlib.import_module("torch.nn.attention.flex_attention")

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < _WINDOW)

    def attend(*arrays: jax.Array) -> jax.Array:
        return attnlab.local_attention(*arrays, window=_WINDOW, is_causal=True)

    blocks = flex.create_block_mask(sees, None, None, length, length, device="cpu")
    compiled = torch.compile(flex.flex_attention)
    for heads, head_dim in _SIZES:
        arrays = _tokens(length, heads, head_dim)
        tensors = [torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays]

        def forward(tensors: Any = tensors) -> None:
            with torch.no_grad():
                compiled(*tensors, block_mask=blocks)

        yield (
            f"window {_WINDOW}, {heads} x {head_dim}",
            "FlexAttention, compiled",
            _jitted(attend, *arrays),
            forward,
        )


def _gated_delta(length: int) -> Pairs:
    """The gated delta rule beside jax-linear-attention's."""
    peer = importlib.import_module("jla.ops.chunked")

    def own(query: jax.Array, key: jax.Array, value: jax.Array, log_decay: jax.Array, beta: jax.Array) -> jax.Array:
        return attnlab.linear_attention(query, key, value, log_decay=log_decay, beta=beta)

    def other(*arrays: jax.Array) -> jax.Array:
        return peer.gated_delta_rule(*arrays)[0]

    for heads, head_dim in _SIZES:
        query, key, value, gates = _tokens(length, heads, head_dim, 4)
        key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
        arrays = (query, key, value, -jax.nn.softplus(gates[..., 0]), jax.nn.sigmoid(gates[..., 1]))
        for gradients in (False, True):
            label = f"gated delta rule, {heads} x {head_dim}{', with gradients' * gradients}"
            ours, theirs = (_jitted(function, *arrays, gradients=gradients) for function in (own, other))
            yield label, "jax-linear-attention", ours, theirs


def _agents(length: int) -> Pairs:
    """Causal agents beside this library's linear attention."""

    def linear(query: jax.Array, key: jax.Array, value: jax.Array, agents: jax.Array) -> jax.Array:
        return attnlab.linear_attention(query, key, value, feature_map="elu", normalize=True)

    for heads, head_dim in _SIZES:
        arrays = _tokens(length, heads, head_dim)
        agents = jax.random.normal(jax.random.key(1), (_AGENTS, heads, head_dim))
        for gradients in (False, True):
            label = f"causal agents ({_AGENTS}), {heads} x {head_dim}{', with gradients' * gradients}"
            ours, theirs = (
                _jitted(function, *arrays, agents, gradients=gradients)
                for function in (attnlab.causal_agent_attention, linear)
            )
            yield label, "linear_attention, elu", ours, theirs


def _blocks(length: int) -> Pairs:
    """An eighth of the key blocks beside dense attention."""
    blocks = -(-length // _BLOCK)
    drawn = np.random.default_rng(0).permuted(np.tile(np.arange(blocks), (blocks, 1)), axis=1)
    lists = jnp.asarray(np.sort(drawn[:, : -(-blocks // 8)])[None, None])

    def sparse(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attnlab.block_sparse_attention(query, key, value, lists, query_block=_BLOCK, key_block=_BLOCK)

    for heads, head_dim in _SIZES:
        arrays = _tokens(length, heads, head_dim)
        for gradients in (False, True):
            label = f"{lists.shape[-1]} of {blocks} blocks of {_BLOCK}, {heads} x {head_dim}"
            functions = sparse, attnlab.dot_product_attention
            ours, theirs = (_jitted(function, *arrays, gradients=gradients) for function in functions)
            yield label + ", with gradients" * gradients, "dot_product_attention", ours, theirs


def _training(length: int) -> Pairs:
    """Ten training steps in nanoGPT's setting for a CPU, beside an equal model of PyTorch, eager and compiled.

    JAX's devices share the batch, as train.Mesh(data=-1) has them do it; JAX_NUM_CPU_DEVICES says how many there are.
    """
    what = f"10 training steps, 12 x 64 tokens, {jax.device_count()} device{'s' * (jax.device_count() > 1)}"
    torch = _torch()
    keep_freed_memory()  # as `attnlab train` does; it holds for both
    own = _training_step()
    eager = _torch_step(torch, compiled=False)
    yield what, "PyTorch, eager", own, eager
    yield what, "PyTorch, compiled", own, _torch_step(torch, compiled=True)


def _training_step() -> Call:
    text = np.random.default_rng(0).integers(0, _VOCABULARY, 4096)
    corpus = data.Corpus("random", text, text, "byte", _VOCABULARY)
    task = train.LanguageTask(corpus, sequence_length=_TOKENS)
    model = models.LanguageModel(vocabulary=_VOCABULARY, mixers=[nn.SoftmaxAttention], depth=_DEPTH, features=_FEATURES)
    optimizer, key = steps.make_optimizer(train.OptimizerOptions(), 10**6), jax.random.key(0)
    mesh = train.Mesh(data=-1).build()
    state = steps.initial_state(model, task, _BATCH, optimizer, key, mesh)
    step = steps.make_step(model, task, optimizer, key, mesh)
    tokens = jax.random.randint(key, (_BATCH, _TOKENS + 1), 0, _VOCABULARY)
    batch = placed({"tokens": tokens}, mesh)

    def call() -> None:
        nonlocal state
        for _ in range(10):
            state = step(state, batch)
        jax.block_until_ready(state.step)

    return call


def _torch_step(torch: Any, compiled: bool) -> Call:
    """The same model, loss and optimizer in PyTorch: RMSNorm, rotary positions, gated MLP, tied embedding."""
    functional, head_dim = torch.nn.functional, _FEATURES // _HEADS
    hidden = -(-_FEATURES * 8 // 24) * 8
    angles = torch.arange(_TOKENS)[:, None] * 10000.0 ** (-torch.arange(0, head_dim // 2) / (head_dim // 2))
    cosine, sine = angles.cos(), angles.sin()

    def turned(x: Any) -> Any:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)

    def linear(inputs: int, outputs: int) -> Any:
        return torch.nn.Linear(inputs, outputs, bias=False)

    layers = torch.nn.ModuleList(
        torch.nn.ModuleDict(
            {
                "mixer_norm": torch.nn.RMSNorm(_FEATURES),
                "qkv": linear(_FEATURES, 3 * _FEATURES),
                "out": linear(_FEATURES, _FEATURES),
                "mlp_norm": torch.nn.RMSNorm(_FEATURES),
                "up": linear(_FEATURES, 2 * hidden),
                "down": linear(hidden, _FEATURES),
            }
        )
        for _ in range(_DEPTH)
    )
    embedding, norm = torch.nn.Embedding(_VOCABULARY, _FEATURES), torch.nn.RMSNorm(_FEATURES)
    torch.nn.init.normal_(embedding.weight, std=0.02)

    def loss(tokens: Any, targets: Any) -> Any:
        x = embedding(tokens)
        for layer in layers:
            qkv = layer["qkv"](layer["mixer_norm"](x)).view(_BATCH, _TOKENS, 3, _HEADS, head_dim)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(turned(query), turned(key), value, is_causal=True)
            x = x + layer["out"](mixed.transpose(1, 2).reshape(_BATCH, _TOKENS, _FEATURES))
            gate, up = layer["up"](layer["mlp_norm"](x)).chunk(2, -1)
            x = x + layer["down"](functional.silu(gate) * up)
        return functional.cross_entropy((norm(x) @ embedding.weight.T).view(-1, _VOCABULARY), targets.reshape(-1))

    parameters = [x for part in (layers, embedding, norm) for x in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), fused=True)
    run = torch.compile(loss) if compiled else loss
    tokens = torch.randint(0, _VOCABULARY, (_BATCH, _TOKENS + 1))

    def call() -> None:
        for _ in range(10):
            optimizer.zero_grad(set_to_none=True)
            run(tokens[:, :-1], tokens[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return call


_PAIRS = {
    "dense": _dense,
    "window": _window,
    "gated-delta": _gated_delta,
    "agents": _agents,
    "blocks": _blocks,
    "training": _training,
}

if __name__ == "__main__":
    main()
