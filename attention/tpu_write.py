"""The kernel that writes KV on a TPU: norms, rotary positions and the write in one launch.

One copy takes whole tiles of a page, so a program reads the aligned group of slots that a row falls in, puts
the row in and writes the group back. It goes through the rows in waves, which bound its memory: all of a wave
is in the pages before the next one reads. Rows of a wave that share a group share its one read and one write.
While groups are on their way, the wave's heads are normalised and rotated.

Rows lie in the sublanes and each head has 128 lanes of its own, so that any number of heads fills whole
tiles.
Its plain form is `attention.heads.write`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.heads import HeadNorms, Places
from attention.tpu_chips import MIB
from attention.tpu_pages import LANES, planes, value_lane, widened
from attention.tpu_plan import SPARE

if TYPE_CHECKING:
    from jax import Array

# Rows of a wave: at most WAVE_ROWS; fewer, but not below LEAST_ROWS, if they took more VMEM than WAVE_BYTES.
WAVE_ROWS = 128
WAVE_BYTES = 4 * MIB
LEAST_ROWS = 16
# Loops are unrolled, as a step waits for its own results: by rows, and by heads of as many rows altogether as
# keep a core busy without spilling its registers.
ROWS_AT_ONCE = 8
HEADS_AT_ONCE = 8
HEAD_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What a kernel is compiled for; `wave` is the rows of a wave."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any
    page_dtype: Any
    normed: bool
    eps: float
    unrolled: bool
    wave: int = 0

    @property
    def planes(self) -> int:
        return planes(self.head_dim)

    @property
    def slots(self) -> int:
        """Slots of a group: the sublanes of a tile."""
        return 32 // jnp.dtype(self.page_dtype).itemsize

    @property
    def group_shape(self) -> tuple[int, ...]:
        return self.kv_heads, self.planes, self.slots, LANES

    @property
    def group_bytes(self) -> int:
        return math.prod(self.group_shape) * jnp.dtype(self.page_dtype).itemsize

    def vmem_bytes(self, wave: int) -> int:
        """Of a wave of so many rows: two buffers of each block that comes or goes, and the scratch."""
        block = 2 * (self.heads + self.kv_heads) * jnp.dtype(self.dtype).itemsize + 2 * 4
        new = self.kv_heads * self.planes * 4
        return wave * LANES * (2 * block + new) + (wave + 1) * self.group_bytes

    def for_rows(self, rows: int) -> _Sizes:
        """The same with the waves for so many rows."""
        wave = WAVE_ROWS
        while wave > LEAST_ROWS and self.vmem_bytes(wave) > WAVE_BYTES:
            wave //= 2
        return replace(self, wave=min(wave, rows))

    def each_row(self, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        """A loop over the rows of a wave."""
        return self._loop(self.wave, body, carry, ROWS_AT_ONCE)

    def each_head(self, count: int, body: Callable[[Array], None]) -> None:
        """A loop over heads, of all rows of a wave."""
        at_once = min(HEADS_AT_ONCE, max(1, HEAD_ROWS_AT_ONCE // self.wave))
        self._loop(count, lambda head, _: body(head), None, at_once)

    def _loop(self, count: int, body: Callable[[Array, Any], Any], carry: Any, at_once: int) -> Any:
        unroll = min(at_once, count) if self.unrolled else 1
        return lax.fori_loop(0, count, body, carry, unroll=unroll)


def write(
    qkv: Array,
    norms: HeadNorms | None,
    angles: tuple[Array, Array],
    pages: Sequence[Array],
    places: Places,
    *,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Array, tuple[Array]]:
    """`attention.backend.Backend.write` to the one array of pages of `attention.tpu_pages`.

    `interpret` runs it without a TPU, as the parameters say if it is such.

    Raises:
      ValueError: a page is not a whole number of groups of slots.
    """
    (array,) = pages
    rows, all_heads, head_dim = qkv.shape
    num_pages, kv_heads, _, page_size, _ = array.shape
    sizes = _Sizes(
        heads=all_heads - 2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=qkv.dtype,
        page_dtype=array.dtype,
        normed=norms is not None,
        eps=0.0 if norms is None else norms.eps,
        unrolled=not interpret,
    ).for_rows(rows)
    if page_size % sizes.slots:
        raise ValueError(f"pages of {page_size} {array.dtype} slots: not a multiple of {sizes.slots}")
    cos, sin = angles
    scales = () if norms is None else (jnp.stack([widened(_wide(scale)) for scale in norms[:2]]),)
    arguments = (
        *_targets(places, num_pages, page_size, sizes),
        widened(qkv).reshape(rows, -1),
        widened(_wide(jnp.concatenate([cos, cos], axis=-1))),
        widened(_wide(jnp.concatenate([-sin, sin], axis=-1))),
        *scales,
        array,
    )
    q, array = _launch(sizes, arguments, interpret)
    return q.reshape(rows, sizes.heads, LANES)[..., :head_dim], (array,)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def _targets(places: Places, num_pages: int, page_size: int, sizes: _Sizes) -> tuple[Array, Array, Array]:
    """Where each row goes: its page, its offset, and the number of its group; int32 [waves * wave].

    The groups of a wave are numbered in the order in which they appear. The number of a row that goes nowhere
    is -1, as is that of those that fill up the last wave.
    """
    page, offset = (jnp.pad(part, (0, -len(part) % sizes.wave), constant_values=-1) for part in places)
    exists = (page >= 0) & (page < num_pages) & (offset >= 0) & (offset < page_size)
    group = jnp.where(exists, page * (page_size // sizes.slots) + offset // sizes.slots, -1)
    group = group.reshape(-1, sizes.wave)
    row = jnp.arange(sizes.wave, dtype=jnp.int32)
    same = group[:, :, None] == group[:, None, :]
    first = jnp.min(jnp.where(same, row, sizes.wave), axis=-1)  # row of the same group
    leads = (first == row) & (group >= 0)
    number = jnp.sum(leads[:, None, :] & (row <= first[:, :, None]), axis=-1, dtype=jnp.int32) - 1
    return page, offset, jnp.where(exists, number.reshape(-1), -1)


def _launch(
    sizes: _Sizes, arguments: Sequence[Array], interpret: bool | pltpu.InterpretParams
) -> tuple[Array, Array]:
    """Rotated queries [rows, heads * 128] and the pages, which are the last argument."""
    *_, qkv, cos, sin = arguments[:6]
    array, wave = arguments[-1], sizes.wave
    rows, width = qkv.shape[0], sizes.heads * LANES

    def block(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((wave, lanes), lambda i, *_: (i, 0))

    scales = [pl.BlockSpec((2, LANES), lambda i, *_: (0, 0))] * sizes.normed
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    shape = jax.ShapeDtypeStruct
    return pl.pallas_call(
        partial(_write_kernel, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(rows, wave),),
            in_specs=[block(qkv.shape[1]), block(LANES), block(LANES), *scales, hbm],
            out_specs=[block(width), hbm],
            scratch_shapes=[
                pltpu.VMEM((sizes.kv_heads, sizes.planes, wave, LANES), jnp.float32),
                pltpu.VMEM((wave + 1, *sizes.group_shape), array.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        # Kept out of VMEM, where XLA would bring the pages of a whole layer if they fitted.
        out_shape=[shape((rows, width), qkv.dtype), pltpu.HBM(array.shape, array.dtype)],
        input_output_aliases={len(arguments) - 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=sizes.vmem_bytes(wave) + SPARE,
            disable_bounds_checks=True,  # rows whose place does not exist have no group
        ),
        cost_estimate=pl.CostEstimate(
            flops=12 * rows * (sizes.heads + sizes.kv_heads) * LANES,
            transcendentals=rows * (sizes.heads + sizes.kv_heads),
            bytes_accessed=sum(x.nbytes for x in (qkv, cos, sin))
            + rows * (width * qkv.dtype.itemsize + 2 * sizes.group_bytes),
        ),
        interpret=pltpu.InterpretParams() if interpret is True else interpret,
        name="kv_write",
    )(*arguments)


def _write_kernel(page_ref, offset_ref, group_ref, qkv_ref, cos_ref, sin_ref, *refs, sizes) -> None:
    *scales_ref, _pages, q_ref, pages_ref, new_ref, groups_ref, arrived = refs
    first_row = pl.program_id(0) * sizes.wave

    def issue(semaphore, *, reads: bool) -> Array:
        """Starts one copy for each group of the wave, from the pages or back; returns how many."""

        def one(i: Array, count: Array) -> Array:
            row = first_row + i
            leads = group_ref[row] == count  # the first row of its group

            @pl.when(leads)
            def _() -> None:
                slot = pl.multiple_of(offset_ref[row] & -sizes.slots, sizes.slots)
                page = pages_ref.at[page_ref[row], :, :, pl.ds(slot, sizes.slots)]
                group = groups_ref.at[count]
                pltpu.make_async_copy(*((page, group) if reads else (group, page)), semaphore).start()

            return jnp.where(leads, count + 1, count)

        return sizes.each_row(one, jnp.int32(0))

    def wait(semaphore, count: Array) -> None:
        """Until all of `count` copies have ended; they end in any order, and a semaphore counts bytes."""

        @pl.when(count > 0)
        def _() -> None:
            some = groups_ref.at[pl.ds(0, count)]
            pltpu.make_async_copy(some, some, semaphore).wait()

    def insert(i: Array, _: None) -> None:
        """Puts the new keys and values of a row into their slot: those that go nowhere into a spare group."""
        row = first_row + i
        group = jnp.where(group_ref[row] < 0, sizes.wave, group_ref[row])
        old = groups_ref[group]
        slot = lax.broadcasted_iota(jnp.int32, old.shape, old.ndim - 2)
        new = new_ref[:, :, pl.ds(i, 1), :].astype(old.dtype)
        groups_ref[group] = jnp.where(slot == offset_ref[row] & (sizes.slots - 1), new, old)

    rotated = partial(_rotated, cos=cos_ref[...], sin=sin_ref[...], sizes=sizes)
    q_scale, k_scale = (scales_ref[0][i : i + 1, :] if scales_ref else None for i in range(2))
    read, written = arrived.at[0], arrived.at[1]
    count = issue(read, reads=True)
    _new_positions(qkv_ref, new_ref, partial(rotated, scale=k_scale), sizes)
    wait(read, count)
    sizes.each_row(insert, None)
    issue(written, reads=False)

    def query(head: Array) -> None:
        q_ref[:, _lanes(head)] = rotated(_wide(qkv_ref[:, _lanes(head)]), scale=q_scale).astype(q_ref.dtype)

    sizes.each_head(sizes.heads, query)
    wait(written, count)


def _new_positions(qkv_ref, new_ref, rotated, sizes: _Sizes) -> None:
    """Lays the wave's new keys and values as pages have them: float32 [kv_heads, planes, wave, 128].

    float32 has a sublane for each row, so that any row can be taken from among them.
    """

    def one(head: Array) -> None:
        key = rotated(_wide(qkv_ref[:, _lanes(sizes.heads + head)]))
        value = _wide(qkv_ref[:, _lanes(sizes.heads + sizes.kv_heads + head)])
        if sizes.planes == 2:
            new_ref[head, 0], new_ref[head, 1] = key, value
        else:
            first = value_lane(sizes.head_dim)
            new_ref[head, 0] = jnp.where(_lane(key) < first, key, pltpu.roll(value, first, 1))

    sizes.each_head(sizes.kv_heads, one)


def _rotated(x: Array, *, cos: Array, sin: Array, scale: Array | None, sizes: _Sizes) -> Array:
    """One head of each row [wave, 128], float32: its norm, if it has a scale, and its rotary position.

    As in `attention.heads`, both results are rounded to the heads' dtype.
    """
    half = sizes.head_dim // 2
    if scale is not None:
        mean = jnp.sum(x * x, axis=-1, keepdims=True) / sizes.head_dim
        x = _wide((x * lax.rsqrt(mean + sizes.eps) * scale).astype(sizes.dtype))
    if sizes.head_dim == LANES:
        partner = pltpu.roll(x, half, 1)
    else:
        partner = jnp.where(_lane(x) < half, pltpu.roll(x, LANES - half, 1), pltpu.roll(x, half, 1))
    turned = x * cos + partner * sin
    if sizes.head_dim < LANES:
        turned = jnp.where(_lane(x) < sizes.head_dim, turned, 0.0)
    return _wide(turned.astype(sizes.dtype))


def _lane(x: Array) -> Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def _lanes(head: Array) -> Any:
    """The lanes of a head."""
    return pl.ds(pl.multiple_of(head * LANES, LANES), LANES)
