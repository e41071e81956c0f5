"""What the kernel of tall tiles moves between global memory and a group of four warps, thread by thread.

A tile's lanes are its rows times the query heads of one KV head. They lie apart in memory, and the last are
not all there, so that no bulk copy moves them. These functions are written in MLIR, a level below Pallas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

TRANSFORMS = (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))
SCALAR = mgpu.Layout.WG_SPLAT(())
CHUNK = 8  # 16-bit elements that a thread moves at once
WARPS, LANES_AT_ONCE = 4, 8


def load_lanes(group: int, lanes: int) -> Callable[..., None]:
    """load(q_ref, q_smem, first_row, head, first_lane): queries of `lanes` lanes into shared memory.

    q_ref is [rows, heads, 128], and q_smem [lanes, 128] with TRANSFORMS. Lanes past the last row repeat it.
    """

    @mgpu.inline_mgpu(arg_types=(mgpu.RefType(), mgpu.RefType(TRANSFORMS), *[SCALAR] * 3))
    def load(ctx: Any, q: Any, smem: Any, first_row: Any, head: Any, first_lane: Any) -> None:
        del ctx
        first_row, head, first_lane = map(_scalar, (first_row, head, first_lane))
        rows = ir.MemRefType(q.type).shape[0]
        some = ir.VectorType.get((CHUNK,), ir.MemRefType(q.type).element_type)
        thread = arith.remui(utils.thread_idx(), _number(32 * WARPS))
        inside, chunk = arith.divui(thread, _number(16)), arith.remui(thread, _number(16))
        column = arith.muli(chunk, _number(CHUNK))
        loaded = []
        for first in range(0, lanes, LANES_AT_ONCE):
            lane = arith.addi(arith.addi(inside, _number(first)), first_lane)
            row = arith.addi(first_row, arith.divui(lane, _number(group)))
            row = arith.minsi(row, _number(rows - 1))
            q_head = arith.addi(arith.muli(head, _number(group)), arith.remui(lane, _number(group)))
            at = _indices(row, q_head, column)
            loaded.append(vector.load(some, q, at, alignment=2 * CHUNK))
        # 16 bytes are swizzled with their row of the 8 x 64 that are contiguous.
        half, chunk = arith.divui(chunk, _number(8)), arith.remui(chunk, _number(8))
        swizzled = arith.muli(arith.xori(chunk, inside), _number(CHUNK))
        for tile, values in enumerate(loaded):
            at = _indices(_number(tile), half, inside, swizzled)
            vector.store(values, smem, at, alignment=2 * CHUNK)

    return load


def clear_rows(page_size: int, pages: int) -> Callable[..., None]:
    """clear(smem, *filled): zeroes the rows of each page from filled[page] on, a thread each.

    smem is [128, 128] with TRANSFORMS, pages * page_size = 128 rows.
    """

    @mgpu.inline_mgpu(arg_types=(mgpu.RefType(TRANSFORMS), *[SCALAR] * pages))
    def clear(ctx: Any, smem: Any, *filled: Any) -> None:
        del ctx
        row = arith.remui(utils.thread_idx(), _number(32 * WARPS))
        page, offset = (op(row, _number(page_size)) for op in (arith.divui, arith.remui))
        limit = _scalar(filled[0])
        for index, other in enumerate(filled[1:], start=1):
            mine = arith.cmpi(arith.CmpIPredicate.eq, page, _number(index))
            limit = arith.select(mine, _scalar(other), limit)
        element = ir.MemRefType(smem.type).element_type
        some = ir.VectorType.get((CHUNK,), element)
        zeros = arith.constant(some, ir.DenseElementsAttr.get_splat(some, ir.FloatAttr.get(element, 0.0)))
        with utils.when(arith.cmpi(arith.CmpIPredicate.sge, offset, limit)):
            tile, inside = (op(row, _number(8)) for op in (arith.divui, arith.remui))
            for half in range(2):
                for chunk in range(8):
                    at = _indices(tile, _number(half), inside, _number(CHUNK * chunk))
                    vector.store(zeros, smem, at, alignment=2 * CHUNK)

    return clear


def store_lanes(group: int, *, parted: bool) -> Callable[..., None]:
    """store(acc, lse, out_ref, lse_ref, part_slots_ref, first, rows, head, first_lane).

    Row r of a tile (r < rows) is stored at `first + r`, or, parted, at part_slots[first + r].
    """
    arrays = (mgpu.Layout.WGMMA, mgpu.Layout.WGMMA.reduce(1))

    @mgpu.inline_mgpu(arg_types=(*arrays, *[mgpu.RefType()] * 3, *[SCALAR] * 4))
    def store(ctx: Any, acc: Any, lse: Any, out: Any, lse_out: Any, slots: Any, *where: Any) -> None:
        del ctx
        first, rows, head, first_lane = map(_scalar, where)
        pair = ir.VectorType.get((2,), ir.MemRefType(out.type).element_type)
        values = _by_row(acc)
        for register, (lane,) in _registers(lse).items():
            lane = arith.addi(arith.index_cast(_i32(), lane), first_lane)
            row, member = arith.divui(lane, _number(group)), arith.remui(lane, _number(group))
            with utils.when(arith.cmpi(arith.CmpIPredicate.slt, row, rows)):
                to = arith.addi(first, row)
                if parted:
                    to = memref.load(slots, _indices(to))
                at = _indices(to, arith.addi(arith.muli(head, _number(group)), member))
                value = lse.registers[register]
                if isinstance(value.type, ir.VectorType):
                    value = vector.extract(value, dynamic_position=[], static_position=[0])
                memref.store(value, lse_out, at)
                for column, both in values[_which(register, lse)]:
                    if both.type != pair:
                        both = arith.truncf(pair, both)
                    vector.store(both, out, [*at, column], alignment=2 * _bytes(pair))

    return store


def _registers(array: Any) -> dict[tuple[int, ...], tuple[Any, ...]]:
    """Where in an array this thread's registers of it belong."""
    return dict(zip(np.ndindex(array.registers.shape), array.layout.thread_idxs(array.shape), strict=True))


def _which(register: tuple[int, ...], array: Any) -> int:
    """Which of its two rows a thread's register belongs to."""
    return register[array.registers.shape.index(2)]


def _by_row(array: Any) -> list[list[tuple[Any, Any]]]:
    """(column, values) of this thread's registers, of each of its two rows."""
    rows: list[list[tuple[Any, Any]]] = [[], []]
    for register, (_, column) in _registers(array).items():
        rows[_which(register, array)].append((column, array.registers[register]))
    return rows


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _number(value: int) -> Any:
    return utils.c(value, _i32())


def _indices(*values: Any) -> list[Any]:
    return [arith.index_cast(ir.IndexType.get(), value) for value in values]


def _scalar(x: Any) -> Any:
    return x.registers.item()


def _bytes(pair: Any) -> int:
    return utils.bytewidth(pair.element_type)
