"""The kernels of attention on a GPU: Pallas, lowered by Triton, over the tiles of `attention.tiles`.

`attend` is two launches; three with tall tiles, which another kernel computes first (`attention.gpu_tall`) in
the same arrays. The first runs a fixed grid of workers over the tiles, longest first. A tile's rows
times their query heads per KV head are the rows of two matrix products for each block of pages, with a
running softmax in base 2 (FlashAttention-2, arXiv 2307.08691); pages that several rows share are read once
for all of them. A tile that was split leaves float32 partial results, which the second launch merges by their
log-sum-exp.

What makes it fast, so that it is not undone by accident: page ids are fetched one block ahead, so that the
loads of keys and values depend on nothing in their own iteration and Triton keeps several blocks in flight;
what a tile begins with is loaded at once, so that its first keys wait for two loads; unfilled page slots are
never loaded (the address is clamped to a filled one), so that values need no mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from attention.tiles import TileList, Tiling, unpack_sees

if TYPE_CHECKING:
    from jax import Array

# Query rows times heads of a tile: the M of its matrix products. Triton's smallest is 16.
NARROW = 16
WIDE = 64
NUM_WARPS = 4
STAGES = 3
LOWEST = -1e30  # where a running maximum starts: finite, as inf - inf is not a number


def attend(
    q: Array, pages: Sequence[Array], tiles: TileList, tiling: Tiling, *, scale: float, interpret: bool
) -> tuple[Array, Array]:
    """`attention.backend.Backend.attend` over pages of keys and of values; the tiles are as of `tiling`."""
    rows, heads, head_dim = q.shape
    slots = tiles.part_slots.shape[0]
    partial_type = jnp.promote_types(jnp.float32, q.dtype)
    shape = jax.ShapeDtypeStruct
    begun: tuple[Array, ...] = ()
    if tiling.tall_rows:
        from attention.gpu_tall import attend_tall  # Mosaic GPU is not loaded where it is not used

        begun = attend_tall(q, pages, tiles, tiling, scale=scale)
    out, lse, part_out, part_lse = launch(
        partial(_tiles_kernel, tiling=tiling, scale=scale, interpret=interpret),
        grid=(min(2 * tiling.workers, tiles.tile_rows.shape[0] * tiling.kv_heads),),
        out_shape=(
            shape(q.shape, q.dtype),
            shape((rows, heads), partial_type),
            shape((slots, heads, head_dim), partial_type),
            shape((slots, heads), partial_type),
        ),
        num_warps=NUM_WARPS,
        num_stages=STAGES if q.dtype.itemsize <= 2 else 1,
        interpret=interpret,
        input_output_aliases={11 + index: index for index in range(len(begun))},
    )(
        q,
        *pages,
        tiles.tile_rows,
        tiles.tile_whole,
        tiles.tile_masked,
        tiles.tile_part,
        tiles.part_slots,
        tiles.page_ids,
        tiles.page_sees,
        tiles.num_tiles.reshape(1),
        *begun,
    )
    merge_heads, merge_parts = merged_at_once(rows)
    out, lse = launch(
        partial(_merge_kernel, merge_heads=merge_heads, merge_parts=merge_parts),
        grid=(rows, pl.cdiv(heads, merge_heads)),
        out_shape=(shape(q.shape, q.dtype), shape((rows, heads), partial_type)),
        num_warps=4,
        interpret=interpret,
        input_output_aliases={3: 0, 4: 1},
    )(part_out, part_lse, tiles.row_parts, out, lse)
    return out, lse


def launch(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int = 1, **arguments: Any
) -> Callable[..., Any]:
    """A pallas_call over whole arrays, addressed by the kernel itself."""
    params = plt.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, compiler_params=params, **arguments)


# --- the tiles ---------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A tile as `TileList` lists it: ranges are (first, count)."""

    rows: tuple[Array, Array]
    whole: tuple[Array, Array]
    masked: tuple[Array, Array]
    part: Array


def _tiles_kernel(
    q_ref,
    k_ref,
    v_ref,
    tile_rows_ref,
    tile_whole_ref,
    tile_masked_ref,
    tile_part_ref,
    part_slots_ref,
    page_ids_ref,
    page_sees_ref,
    num_tiles_ref,
    *refs,
    tiling: Tiling,
    scale: float,
    interpret: bool,
) -> None:
    out_ref, lse_ref, part_out_ref, part_lse_ref = refs[-4:]
    group = q_ref.shape[1] // tiling.kv_heads
    head_dim = q_ref.shape[2]
    block_tokens = tiling.block_pages * tiling.page_size
    position = jnp.arange(block_tokens, dtype=jnp.int32)
    # A block of one page is addressed by a scalar, which is cheaper than an id for each position.
    which = position // tiling.page_size if tiling.block_pages > 1 else jnp.int32(0)
    own_offset = position % tiling.page_size
    dims = jnp.arange(head_dim, dtype=jnp.int32)
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    accumulate = lse_ref.dtype
    to_base_2 = scale * math.log2(math.e)
    exp2 = partial(exponential, to_base_2, fast=not interpret and accumulate == jnp.float32)

    def run(tile: _Tile, head: Array, lanes: int) -> None:
        lane = jnp.arange(lanes, dtype=jnp.int32)
        row = lane // group
        first_row, count = tile.rows
        in_tile = row < count
        q_row, q_head = first_row + row, head * group + lane % group
        part = tile.part
        parted, slots = in_tile & (part >= 0), part_slots_ref.shape[0]
        slot = jnp.where(parted, part_slots_ref[jnp.clip(part + row, 0, slots - 1)], slots)
        query = q_ref[jnp.minimum(q_row, q_ref.shape[0] - 1)[:, None], q_head[:, None], dims[None, :]]

        def refs(listed: tuple[Array, Array], block: Array) -> tuple[Array, Array]:
            """Page references of a block of a list, and which of its positions are not past the end."""
            index = block * tiling.block_pages + which
            first, size = listed
            return first + jnp.minimum(index, size - 1), index < size

        def load(pages_ref, ids: Array, offset: Array | None) -> Array:
            if tiling.block_pages > 1:
                ids = ids[:, None]
                offset = own_offset if offset is None else offset
            if offset is None:
                return pages_ref[ids, head]
            return pages_ref[ids, head, offset[:, None], dims[None, :]]

        def add(state, ids: Array, offset: Array | None, visible: Array | None):
            total, highest, acc = state
            scores = _dot(query, load(k_ref, ids, offset), (1, 1), accumulate, precision)
            if visible is not None:
                scores = jnp.where(visible, scores, -jnp.inf)
            new_highest = jnp.maximum(highest, scores.max(axis=1))
            weights = exp2(scores, (-to_base_2 * new_highest)[:, None])
            # Not exp2(highest, shift): of two LOWESTs the fused multiply-add would keep the rounding error.
            shrink = exp2(highest - new_highest, jnp.zeros_like(highest))
            v = load(v_ref, ids, offset)
            acc = acc * shrink[:, None] + _dot(weights.astype(v.dtype), v, (1, 0), accumulate, precision)
            return total * shrink + weights.sum(axis=1), new_highest, acc

        def whole_block(block: Array, carry):
            state, ids = carry
            ahead = page_ids_ref[refs(tile.whole, block + 1)[0]]
            listed = refs(tile.whole, block)[1][None, :] if tiling.block_pages > 1 else None
            return add(state, ids, None, listed), ahead

        def masked_block(block: Array, carry):
            state, ids, sees = carry
            ahead, _ = refs(tile.masked, block + 1)
            ids_ahead, sees_ahead = page_ids_ref[ahead], page_sees_ref[ahead]
            valid, first, end, causal = unpack_sees(sees)
            _, listed = refs(tile.masked, block)
            first = jnp.maximum(first, own_offset - causal)
            rows = jnp.where(listed & (own_offset < valid), jnp.maximum(end - first, 0), 0)
            # first <= row < first + rows, in one comparison: a negative difference is a large unsigned one.
            visible = (row[:, None] - first[None, :]).astype(jnp.uint32) < rows[None, :].astype(jnp.uint32)
            state = add(state, ids, jnp.minimum(own_offset, valid - 1), visible)
            return state, ids_ahead, sees_ahead

        state = _nothing_seen(lanes, head_dim, accumulate)
        zero = jnp.int32(0)
        whole, masked = (jnp.maximum(refs(listed, zero)[0], 0) for listed in (tile.whole, tile.masked))
        ids, masked_first = page_ids_ref[whole], (page_ids_ref[masked], page_sees_ref[masked])
        blocks = _ceil_div(tile.whole[1], tiling.block_pages)
        state, _ = lax.fori_loop(zero, blocks, whole_block, (state, ids))
        blocks = _ceil_div(tile.masked[1], tiling.block_pages)
        state, _, _ = lax.fori_loop(zero, blocks, masked_block, (state, *masked_first))

        total, highest, acc = state
        out, lse = _finished(total, highest * scale, acc)
        final = in_tile & (part < 0)
        plt.store(
            out_ref.at[q_row[:, None], q_head[:, None], dims[None, :]],
            out.astype(out_ref.dtype),
            mask=final[:, None],
        )
        plt.store(lse_ref.at[q_row, q_head], lse, mask=final)
        plt.store(part_out_ref.at[slot[:, None], q_head[:, None], dims[None, :]], out, mask=parted[:, None])
        plt.store(part_lse_ref.at[slot, q_head], lse, mask=parted)

    def one(turn: Array, _: None) -> None:
        index = worker + turn * workers
        at, head = index // tiling.kv_heads, index % tiling.kv_heads
        tile = _Tile(
            rows=(tile_rows_ref[at, 0], tile_rows_ref[at, 1]),
            whole=(tile_whole_ref[at, 0], tile_whole_ref[at, 1]),
            masked=(tile_masked_ref[at, 0], tile_masked_ref[at, 1]),
            part=tile_part_ref[at],
        )
        rows = tile.rows[1]
        mine = (rows > 0) & (rows <= tiling.wide_rows) if tiling.tall_rows else rows > 0

        @pl.when(mine)
        def _() -> None:
            if tiling.alone:  # matrix products of other shapes may round differently
                run(tile, head, WIDE)
            else:
                narrow = rows <= tiling.narrow_rows
                lax.cond(narrow, lambda: run(tile, head, NARROW), lambda: run(tile, head, WIDE))

    worker, workers = pl.program_id(0), pl.num_programs(0)
    # The first tile need not wait for the number of tiles: one that is padding has no rows.
    turns = jnp.maximum(1, _ceil_div(num_tiles_ref[0] * tiling.kv_heads - worker, workers))
    lax.fori_loop(jnp.int32(0), turns, one, None)


def exponential(factor: float, x: Array, shift: Array, *, fast: bool) -> Array:
    """2 ** (factor * x + shift). `fast`: two instructions; denormal results, which weigh nothing, are 0."""
    if not fast:
        return jnp.exp2(factor * x + shift)
    shift = jnp.broadcast_to(shift, x.shape)
    asm = "{.reg .f32 t; fma.rn.ftz.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t;}"
    (result,) = plt.elementwise_inline_asm(
        asm,
        args=[x, jnp.full(x.shape, factor, x.dtype), shift],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def _nothing_seen(lanes: int, head_dim: int, dtype: Any) -> tuple[Array, Array, Array]:
    """The running sum of weights, the highest score, and the values' weighted sum, of each lane."""
    return jnp.zeros(lanes, dtype), jnp.full(lanes, LOWEST, dtype), jnp.zeros((lanes, head_dim), dtype)


def _finished(total: Array, highest: Array, acc: Array) -> tuple[Array, Array]:
    """The weighted mean of the values and the natural log-sum-exp of the scores: zero and -inf of nothing."""
    out = acc / jnp.where(total == 0, 1, total)[:, None]
    return out, jnp.where(total == 0, -jnp.inf, highest + jnp.log(total))


def _dot(a: Array, b: Array, contract: tuple[int, int], accumulate, precision) -> Array:
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=accumulate,
        precision=precision,
    )


def _ceil_div(n: Array, d: int | Array) -> Array:
    return (n + (d - 1)) // d


# --- the partial results -----------------------------------------------------------------------------------


def merged_at_once(rows: int) -> tuple[int, int]:
    """Heads of one program of the merge, and partial results that it reads at once, by a bucket's rows.

    Of few rows there are many partial results each, and programs to spare.
    """
    return (1, 32) if rows <= 16 else (4, 8)


def _merge_kernel(
    part_out_ref,
    part_lse_ref,
    row_parts_ref,
    _out,
    _lse,
    out_ref,
    lse_ref,
    *,
    merge_heads: int,
    merge_parts: int,
) -> None:
    row = pl.program_id(0)
    first, count = row_parts_ref[row, 0], row_parts_ref[row, 1]
    heads, head_dim = out_ref.shape[1:]
    accumulate = part_lse_ref.dtype
    head = pl.program_id(1) * merge_heads + jnp.arange(merge_heads, dtype=jnp.int32)
    read_head = jnp.minimum(head, heads - 1)
    dims = jnp.arange(head_dim, dtype=jnp.int32)
    part = jnp.arange(merge_parts, dtype=jnp.int32)

    def add(block: Array, state):
        total, highest, acc = state
        index = block * merge_parts + part
        slot = first + jnp.minimum(index, count - 1)
        lse = part_lse_ref[slot[:, None], read_head[None, :]]
        lse = jnp.where((index < count)[:, None], lse, -jnp.inf)
        out = part_out_ref[slot[:, None, None], read_head[None, :, None], dims[None, None, :]]
        new_highest = jnp.maximum(highest, lse.max(axis=0))
        weights = jnp.exp(lse - new_highest[None, :])
        shrink = jnp.exp(highest - new_highest)
        acc = acc * shrink[:, None] + (weights[:, :, None] * out).sum(axis=0)
        return total * shrink + weights.sum(axis=0), new_highest, acc

    @pl.when(count >= 0)
    def _() -> None:
        state = _nothing_seen(merge_heads, head_dim, accumulate)
        state = lax.fori_loop(jnp.int32(0), _ceil_div(count, merge_parts), add, state)
        out, lse = _finished(*state)
        exists = head < heads
        plt.store(
            out_ref.at[row, head[:, None], dims[None, :]], out.astype(out_ref.dtype), mask=exists[:, None]
        )
        plt.store(lse_ref.at[row, head], lse, mask=exists)
