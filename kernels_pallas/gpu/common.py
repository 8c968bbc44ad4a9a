"""What the GPU kernels share: products, loads, layouts and copies, each as the GPU does it and as it is simulated.

Kernels are written for Mosaic GPU on Hopper (sm_90a). Two warpgroups of 128 threads compute, and the first one also has
the memory system bring tiles into shared memory (TMA): with no third warpgroup every thread may hold 255 registers.

A simulation (simulation.py) is Pallas's interpret mode on a CPU. That mode has no rule for a product whose left operand
is in registers, none for one that adds to an accumulator, and its products are invisible to the detector of races. So a
simulated product loads its operands from shared memory, where the detector sees it, and
multiplies them in float32. Asynchrony of products is the one thing that a simulation does not model.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.gpu.simulation import interpretation, is_simulated

Array = jax.Array

ROWS = 64  # of a matrix that a warpgroup multiplies
WARPGROUPS = 2
SMEM_BUDGET = 227 * 2**10  # bytes of shared memory that a block may take
MATRIX = plgpu.Layout.WGMMA  # of a matrix in registers, over the threads of a warpgroup
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # of one number per row, or per column
# Of 16-bit and of 32-bit matrices in shared memory.
HALF = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
SINGLE = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))

_load: Any = plgpu.load  # its arguments depend on the version of jax


def launch(
    body: Callable[..., None],
    name: str,
    *operands: Any,
    out: Sequence[tuple[tuple[int, ...], Any]],
    grid: dict[str, int],
    scratch: Sequence[Any],
    warpgroups: int = WARPGROUPS,
) -> list[Array]:
    """Runs body(*operands, *out, *scratch), refs all, on a grid of blocks of so many warpgroups.

    out: (shape, dtype) of each result. grid: sizes by axis name, the last one varying fastest; a warpgroup knows its
    number by lax.axis_index("warpgroup").
    """
    varying = jax.sharding.ManualAxisType(
        varying=frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
    )
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in out],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=list(scratch),
        # Reductions stay within warps: they need no shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpretation(),
        kernel_name=name,
    )
    return [_varying_over(x, varying.varying) for x in kernel(*operands)]


def _varying_over(x: Array, axes: frozenset[Any]) -> Array:
    """Inside shard_map: what a kernel gives varies over the mesh as what it reads does, which its refs do not say."""
    missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return lax.pcast(x, missing, to="varying") if missing else x


def in_loop(number: Array) -> Array:
    """0, in a way that the compiler does not see; number: of a loop whose count comes from memory, below 2^30.

    What a loop reads at `index + in_loop(number)` is addressed in it. Compilers otherwise compute the addresses of what
    stays in shared memory, 16 of them for a product over 256 columns, and all that a mask does not take from the
    loop's number, before the loop, and keep them in registers that there are not.
    """
    return lax.shift_right_arithmetic(number, np.int32(30))


# --- Registers --------------------------------------------------------------------------------------------------------


def full(shape: tuple[int, ...], value: Any, layout: Any = MATRIX) -> Array:
    x = jnp.full(shape, value, jnp.float32)
    return x if is_simulated() else plgpu.layout_cast(x, layout)


def iota(shape: tuple[int, int], axis: int) -> Array:
    """The number of a matrix's row (axis 0) or column (1), int32."""
    if is_simulated():
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def by_row(x: Array, shape: tuple[int, int]) -> Array:
    """A number per row, over a matrix."""
    return lax.broadcast_in_dim(x, shape, [0])


def by_column(x: Array, shape: tuple[int, int]) -> Array:
    """A number per column, over a matrix."""
    return lax.broadcast_in_dim(x, shape, [1])


def load(ref: Any, layout: Any) -> Array:
    """From shared or global memory into registers."""
    if is_simulated():
        return ref[...]
    if _takes_index():
        return _load(ref, (), layout=layout, optimized=False)
    if layout == COLUMN and _in_shared_memory(ref):
        # Loads by columns beside loads by rows: jax 0.12 searches for layouts until it gives up.
        return plgpu.layout_cast(ref[...], layout)
    return _load(ref, layout=layout, optimized=False)


def _in_shared_memory(ref: Any) -> bool:
    return jax.typeof(ref.ref if hasattr(ref, "transforms") else ref).memory_space == plgpu.SMEM


@functools.cache
def _takes_index() -> bool:
    """Whether loads want an index beside the ref, as in jax 0.10."""
    index = inspect.signature(_load).parameters.get("idx")
    return index is not None and index.default is inspect.Parameter.empty


# --- Products ---------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """a @ b. a: in shared memory, a ref, or in registers. b: in shared memory. Either ref may be read transposed."""

    a: Any
    b: Any
    a_transposed: bool = False
    b_transposed: bool = False


def dot(*products: Product, shape: tuple[int, int]) -> Array:
    """The sum of these products, float32, of this shape."""
    [out] = dots(products, shape=shape)
    return out


def dots(*sums: Sequence[Product], shape: tuple[int, int], work: Callable[[], None] | None = None) -> list[Array]:
    """Several sums of products at once. `work` stores something beside them."""
    if is_simulated():
        if work is not None:
            work()
        return _ordered([functools.reduce(jnp.add, map(_simulated_product, products)) for products in sums])

    def scope(*refs: Any) -> list[Array]:
        for ref, products in zip(refs, sums):
            _issue(ref, products)
        if work is not None:
            work()
        return [ref[...] for ref in refs]

    return pl.run_scoped(scope, *[plgpu.ACC(shape, jnp.float32)] * len(sums))


def add_dot(x: Array, *products: Product) -> Array:
    """x plus the products."""
    if is_simulated():
        [out] = _ordered([x + sum(map(_simulated_product, products))])
        return out
    return pl.run_state(lambda ref: _issue(ref, products))(plgpu.ACC.init(x))


def dot_beside(*products: Product, shape: tuple[int, int], work: Callable[[], Any]) -> tuple[Array, Any]:
    """(the sum of these products, work()): what `work` computes runs beside the products."""
    if is_simulated():
        done = work()
        return dot(*products, shape=shape), done

    def scope(ref: Any) -> tuple[Array, Any]:
        _issue(ref, products)
        done = work()
        return ref[...], done

    return pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))


def _issue(accumulator: Any, products: Sequence[Product]) -> None:
    for a, b, a_transposed, b_transposed in products:
        plgpu.wgmma(accumulator, transposed(a) if a_transposed else a, transposed(b) if b_transposed else b)


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def _simulated_product(product: Product) -> Array:
    a, b = (x[...] if _is_ref(x) else x for x in product[:2])
    over = (((0 if product.a_transposed else 1,), (1 if product.b_transposed else 0,)), ((), ()))
    return lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), over)


def _ordered(results: list[Array]) -> list[Array]:
    # The tensor cores read shared memory as copies do, the simulated loads do not: what is copied later comes later.
    plgpu.commit_smem()
    return results


def _is_ref(x: Any) -> bool:
    return hasattr(x, "transforms") or not isinstance(jax.typeof(x), jax.core.ShapedArray)


# --- Shared memory ----------------------------------------------------------------------------------------------------


def half(*shape: int, dtype: Any) -> Any:
    """Scratch of 16-bit matrices, the operands of products."""
    return plgpu.SMEM(shape, dtype, transforms=HALF)


def single(*shape: int) -> Any:
    """Scratch of float32 matrices."""
    return plgpu.SMEM(shape, jnp.float32, transforms=SINGLE)


def store(ref: Any, value: Array) -> None:
    """Into shared memory, for products and copies that come later."""
    ref[...] = value.astype(ref.dtype)
    plgpu.commit_smem()


class Ring(NamedTuple):
    """Slots of shared memory that warpgroup 0 fills with what comes next, and all warpgroups read.

    fetch(place, slot, barrier): issues the copies of what is at find(number), by default the number, into a slot.
    count: how many there are. ready, free: barriers per slot, of as many arrivals as there are copies, and warpgroups;
    a warpgroup alone needs no `free`.
    """

    fetch: Callable[[Any, Array, Any], None]
    count: Any
    ready: Any
    free: Any
    slots: int
    find: Callable[[Array], Any] = lambda number: number

    def slot(self, number: Array) -> Array:
        return lax.rem(number, jnp.int32(self.slots))

    def start(self) -> None:
        """Fills the slots."""

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _() -> None:
            # All are looked up before the first is waited for.
            last = jnp.maximum(self.count - 1, 0)
            places = [self.find(jnp.minimum(jnp.int32(number), last)) for number in range(self.slots)]
            for number, place in enumerate(places):

                @pl.when(number < self.count)
                def _(number: int = number, place: Any = place) -> None:
                    self._fetch(jnp.int32(number), place)

    def _fetch(self, number: Array, place: Any) -> None:
        slot = self.slot(number)
        self.fetch(place, slot, self.ready.at[slot])

    def wait(self, number: Array) -> None:
        """Until that number is there."""
        plgpu.barrier_wait(self.ready.at[self.slot(number)])

    def release(self, number: Array) -> None:
        """This warpgroup has read that number; when all have, its slot is filled anew."""
        slot = self.slot(number)
        if self.free is None:
            plgpu.commit_smem()  # all threads have read it

            @pl.when(number + self.slots < self.count)
            def _() -> None:
                self._fetch(number + self.slots, self.find(number + self.slots))

            return
        plgpu.barrier_arrive(self.free.at[slot])

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])  # the last ones too: jax 0.10's simulation wants all phases seen

            @pl.when(number + self.slots < self.count)
            def _() -> None:
                self._fetch(number + self.slots, self.find(number + self.slots))


def barriers(slots: int, arrivals: int) -> Any:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)
