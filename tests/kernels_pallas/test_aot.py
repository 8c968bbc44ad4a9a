"""Kernels compile for TPUs on a machine without one, and a call that names no implementation takes them there."""

import importlib.util
import itertools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from marks import slow_but

import attnlab
import kernels_pallas
from attnlab import local_attention
from kernels_pallas.aot.compile import TOPOLOGIES, compile_for_tpu
from kernels_pallas.aot.peers import OTHERS
from kernels_pallas.aot.schedule import Schedule, parse
from kernels_pallas.aot.table import KERNELS, _chunked_linear, _measure
from kernels_pallas.shapes import SHAPES, Shape

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu (the extra tpu-aot)"
)
KERNEL = "tpu_custom_call"
QUERY, KEY = (jax.ShapeDtypeStruct((2, 300, heads, 80), jnp.bfloat16) for heads in (4, 2))
SEGMENTS = jax.ShapeDtypeStruct((2, 300), jnp.int32)


def loss(query, key, value, segment_ids=None):
    out = local_attention(query, key, value, window=70, is_causal=True, segment_ids=segment_ids)
    return (out.astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize("tpu", slow_but(["v5e"], ["v5e", "v5p"]))
@pytest.mark.long
def test_none_takes_the_kernel_on_a_tpu(tpu):
    forward = compile_for_tpu(
        lambda *a: local_attention(*a, window=70, sinks=4, is_causal=True), QUERY, KEY, KEY, tpu=tpu
    )
    assert KERNEL in forward.as_text()
    gradient = compile_for_tpu(jax.grad(loss, argnums=(0, 1, 2)), QUERY, KEY, KEY, SEGMENTS, tpu=tpu)
    calls = [line for line in gradient.as_text().splitlines() if KERNEL in line]
    for name in ("banded_flash_attention", "banded_flash_gradients"):
        assert any(name in line for line in calls), name


@pytest.mark.parametrize("shape", slow_but([(1, 4, 1, 300)], [(1, 4, 1, 300), (2, 1, 300, 300)]))
@pytest.mark.parametrize("of_bias", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_bias_takes_the_kernels_and_that_of_its_gradient_where_it_is_asked_for(of_bias, shape):
    def loss(query, key, value, bias):
        out = attnlab.dot_product_attention(query, key, value, bias=bias, is_causal=True)
        return (out.astype(jnp.float32) ** 2).sum()

    bias = jax.ShapeDtypeStruct(shape, jnp.float32)
    gradient = jax.grad(loss, argnums=(0, 1, 2, 3) if of_bias else (0, 1, 2))
    compiled = compile_for_tpu(gradient, QUERY, KEY, KEY, bias, tpu="v6e").as_text()
    assert compiled.count('custom_call_target="tpu_custom_call"') == 2 + of_bias
    assert ("banded_flash_bias_gradient" in compiled) == of_bias


@pytest.mark.parametrize("tpu", slow_but(["v5p", "v6e"], ["v5e", "v5p", "v6e", "tpu7x"]))
@pytest.mark.long
def test_decoding_in_a_scan_takes_the_kernels(tpu):
    clusters = attnlab.init_routing(jax.random.key(0), 4, 3, 80)

    def decode(caches, tokens):
        def step(caches, token):
            window, state, gathered, keys, rings = caches
            near, window = attnlab.local_step(window, *token, window=70)
            far, state = attnlab.linear_step(state, *token, log_decay=jnp.full(4, -0.1))
            fitted, keys = attnlab.local_linear_step(keys, *token, ridge=1.0)
            read, gathered = attnlab.agent_step(gathered, *token, jnp.ones((5, 4, 80)))
            routed, rings = attnlab.routing_step(rings, *token, clusters)
            return (window, state, gathered, keys, rings), near + far + fitted + read + routed

        return jax.lax.scan(step, caches, tokens)

    caches = jax.eval_shape(
        lambda: (
            attnlab.init_local_cache(2, 2, 80, window=70, dtype=jnp.bfloat16),
            attnlab.init_linear_cache(2, 4, 80),
            attnlab.init_agent_cache(2, 4, 5, 80),
            attnlab.init_local_linear_cache(2, 100, 2, 80, dtype=jnp.bfloat16),
            attnlab.init_routing_cache(2, 4, 3, 80, window=50, dtype=jnp.bfloat16),
        )
    )
    tokens = [jax.ShapeDtypeStruct((9, 2, 1, heads, 80), jnp.bfloat16) for heads in (4, 2, 2)]
    compiled = compile_for_tpu(decode, caches, tokens, tpu=tpu).as_text()
    for name in ("cached_flash_attention", '"linear_step', "local_linear_step", "routing_step"):
        assert name in compiled, name
    assert compiled.count('custom_call_target="tpu_custom_call"') == 5


@pytest.mark.parametrize("tpu", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.slow
def test_several_tokens_of_rows_of_their_own_take_the_kernel(tpu):
    heads = {"llama-like": (32, 8, 128), "gemma-like": (8, 4, 256)}
    for count, key_heads, head_dim in heads.values():
        cache = jax.eval_shape(
            lambda: attnlab.init_dot_product_cache(2, 8192, key_heads, head_dim, dtype=jnp.bfloat16)  # noqa: B023
        )._replace(length=jax.ShapeDtypeStruct((2,), jnp.int32))
        tokens = [jax.ShapeDtypeStruct((2, 8, n, head_dim), jnp.bfloat16) for n in (count, key_heads, key_heads)]
        compiled = compile_for_tpu(attnlab.dot_product_step, cache, *tokens, tpu=tpu).as_text()
        assert "cached_flash_attention" in compiled


@pytest.mark.slow
def test_vmap_and_x64_compile():
    batched = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (QUERY, KEY, KEY)]
    assert KERNEL in compile_for_tpu(jax.vmap(loss), *batched, tpu="v5e").as_text()
    scaled = jax.vmap(lambda x, scale: local_attention(x, x, x, window=9, scale=scale))
    scales = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert KERNEL in compile_for_tpu(scaled, batched[0], scales, tpu="v5e").as_text()
    with jax.enable_x64(True):
        assert KERNEL in compile_for_tpu(loss, QUERY, KEY, KEY, SEGMENTS, tpu="v5e").as_text()


@pytest.mark.long
def test_a_name_overrides_the_choice():
    blocked = compile_for_tpu(
        lambda *a: local_attention(*a, window=70, implementation="xla"), QUERY, KEY, KEY, tpu="v5e"
    )
    assert KERNEL not in blocked.as_text()


QUICK = {("v6e", "small model 2k")}
QUICK_KERNELS = "banded flash", "linear, gated delta", "decode, cache"


@pytest.mark.parametrize(
    "kernel", [name if name in QUICK_KERNELS else pytest.param(name, marks=pytest.mark.long) for name in KERNELS]
)
@pytest.mark.parametrize(
    ("tpu", "shape"),
    [
        pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(TOPOLOGIES, SHAPES)
    ],
)
@pytest.mark.long
def test_kernels_compile(kernel, tpu, shape):
    row = KERNELS[kernel](SHAPES[shape])
    assert KERNEL in compile_for_tpu(row.function, *row.arrays, tpu=tpu).as_text()


def table(tpu, shape, names):
    """What the command prints, as columns of rows by the kernel's name; each was compiled."""
    command = [sys.executable, "-m", "kernels_pallas.aot", "--tpu", tpu, "--shape", shape, "--kernel", *names]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = {cells[1]: dict(zip(titles(lines[0])[1:-1], cells[1:-1])) for cells in map(titles, lines[2:])}
    assert list(rows) == names
    assert {row["compiled"] for row in rows.values()} == {"yes"}
    return rows


LINEAR = list(itertools.product((None, "token", "channel"), (False, True), TOPOLOGIES))  # decay, delta, TPU


@pytest.mark.parametrize("call", slow_but([("channel", False, "v5p")], LINEAR), ids=str)
@pytest.mark.long
def test_vmem_holds_gradients_of_linear_attention_with_a_key_head_for_every_head(call):
    decay, delta, tpu = call
    row = _chunked_linear(Shape(1024, 1024, 16, 16, 128), decay=decay, delta=delta, backward=True)
    assert "chunked_linear_gradients" in compile_for_tpu(row.function, *row.arrays, tpu=tpu).as_text()


@pytest.mark.long
def test_the_command_prints_a_table():
    rows = table("v5p", "small model 2k", ["banded flash", "linear"])
    assert 0 < float(rows["banded flash"]["VMEM MiB"]) < 16
    for row in rows.values():
        assert 0 < number(row["bundles per tile"]) < number(row["cycles"])
        assert 0 < number(row["matmul"]) < 100
    assert number(rows["linear"]["cycles"]) < number(rows["banded flash"]["cycles"])


@pytest.mark.parametrize(
    ("regions", "cycles"),
    [
        ((100, 900, 30), 10 + 8 * 5 + 2 * 100 + 8 * 900 + 3 * 30),
        ((900, 100), 10 + 8 * 5 + 8 * 900 + 3 * 100),  # one body is predicated: at most, the one with fewer runs
        ((40, 100, 900, 30, 35), 10 + 8 * (5 + 30 + 35) + 2 * 40 + 8 * 100 + 3 * 900),  # two are the pipeline's own
    ],
)
def test_cycles_are_those_of_all_regions_by_their_runs(regions, cycles):
    schedule = Schedule(before=10, step=5, step_matmuls=0, regions=regions, matmuls=(0,) * len(regions))
    assert schedule.cycles(8, (2, 8, 3)) == (cycles, 0)


def test_bodies_that_multiply_are_the_regions_that_do():
    """The first body is predicated, and the second one that multiplies, the largest, does not run."""
    schedule = Schedule(before=10, step=5, step_matmuls=0, regions=(300, 100, 900, 40), matmuls=(0, 60, 700, 0))
    cycles = 10 + 8 * 5 + 8 * 100 + 2 * 300 + 2 * 40
    assert schedule.cycles(8, (1, 2, 8, 0, 2), products=(2, 3)) == (cycles, 8 * 60)


def test_a_kernel_s_own_loops_count_as_often_as_they_run():
    """One of the pipeline's, and two of the kernel's; the inner one ends among the outer one's lines."""
    lines = [">", ">", "LB >>", ">>", ">", "LB >>", "LB >>>", ">>>", ">>", ">>>", ">>", ">"]
    text = ["0x1 : {", "0x2 LB: > {"]
    marks = [line.partition(" ") if " " in line else ("", "", line) for line in lines]
    text += [f"0x9 {mark}{'' if mark else ' '}: {nested} {{" for mark, _, nested in marks]
    text += ["0xa : > { /* loop exit test */ sbr.rel (!%p) target = $region1 }", "0xb : {"]
    units = "UTILIZATION:\n" + "\n".join("1" if ">>>" in line else "0" for line in text)
    schedule = parse("\n".join(text), units)
    assert schedule.loops == ((2, 0), (3, 0), (3, 3))
    assert (schedule.before, schedule.step, schedule.step_matmuls) == (2, 14, 3)
    assert schedule.cycles(10, (), loops=(10, 40)) == (2 + 10 * 14 + 10 * 3 + 40 * 3, 150)


def test_a_region_with_a_region_in_it_counts_as_often_as_it_runs_and_delays_are_of_their_loop():
    """A kernel's loop, whose body has a region of 9 bundles around one of 30; a delay says not how deep it is."""
    holder = ["sbr.rel (%p1) target = $region2"] + ["vadd"] * 7 + ["sbr.rel (%p2) target = $region3"]
    inside = ["sbr.rel (%p0) target = $region1", *holder, *["vmatmul"] * 30, "/* End empty region 3 */"]
    inside += ["/* End empty region 2 */"]
    lines = ["0x0 : {", "0x1 LB: > {", *(f"0x2 {'LB' * (not i)}: >> {{ {what}" for i, what in enumerate(inside))]
    lines += ["0x3 :  {}", "0x4 : > { /* End empty region 1 */", "0x5 : > { /* loop exit test */ sbr.rel region = 9"]
    units = "UTILIZATION:\n" + "\n".join("1" if "vmatmul" in line else "0" for line in lines)
    schedule = parse("\n".join(lines), units)
    assert (schedule.regions, schedule.matmuls) == ((30,), (30,))
    assert schedule.holders == ((9, 0),)
    (loop,) = schedule.loops
    assert loop == (len(inside) + 1, 30)
    # 5 steps; the loop runs 20 times, the region around 12 times and the one in it 3 times.
    bundles, matmuls = schedule.cycles(5, (3 - 15,), loops=(15,), holders=(12 - 20,))
    assert bundles == schedule.before + 5 * (schedule.step - loop[0] + 30) + 20 * (loop[0] - 9 - 30) + 12 * 9 + 3 * 30
    assert matmuls == 3 * 30


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deltanet_tpu", None)
    row = OTHERS["deltanet-tpu, gated delta"]
    compiled, *rest = _measure(row, SHAPES["small model 2k"], "v6e", lambda names: {})
    assert compiled == "missing: deltanet_tpu"
    assert not any(rest)


@pytest.mark.slow
@pytest.mark.parametrize(("tpu", "gradients"), [("v5p", False), ("v5p", True), ("v6e", True)])
def test_banded_flash_takes_no_more_cycles_than_splash_attention(tpu, gradients):
    """JAX's, at the same tiles: per tile, and in all. At the size of the kernels' README."""
    names = ["banded flash", "jax splash"]
    names += ["banded flash gradients", "jax splash gradients"] if gradients else []
    rows = table(tpu, "llama-like 8k", names)
    for ours, theirs in zip(names[::2], names[1::2]):
        for column in ("bundles per tile", "cycles"):
            assert 0 < number(rows[ours][column]) <= number(rows[theirs][column])


def number(cell):
    return int(cell.replace(",", "").rstrip("%"))


def titles(line):
    return [cell.strip() for cell in line.split("|")]


README = pathlib.Path(kernels_pallas.__file__).with_name("README.md").read_text()
# Of kernels_pallas/README.md: (kernel, TPU) -> cycles.
FIGURES = {
    (cells[1], cells[2]): number(cells[6])
    for cells in map(titles, README.partition("| kernel | TPU |")[2].partition("\n\n")[0].splitlines()[2:])
}


@pytest.mark.slow
@pytest.mark.skipif(f"jax {jax.__version__}," not in README, reason="the table is of another jax's compiler")
@pytest.mark.parametrize(("kernel", "tpu"), [pair for pair in FIGURES if pair[0] in KERNELS])
def test_no_kernel_takes_more_cycles_than_its_table_says(kernel, tpu):
    """By no more than 2 %; whoever makes one slower changes the table, and says why."""
    assert number(table(tpu, "llama-like 8k", [kernel])[kernel]["cycles"]) <= 1.02 * FIGURES[kernel, tpu]


def test_every_kernel_is_in_the_table():
    assert {kernel for kernel, _ in FIGURES} == {*KERNELS, *OTHERS}
