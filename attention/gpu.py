"""Attention for NVIDIA GPUs: Pallas kernels, lowered by Triton, over the tiles of `attention.tiles`.

`attend` is two launches. The first runs a fixed grid of workers over the tiles, longest first. A tile's rows
times their query heads per KV head are the rows of two matrix products for each block of pages, with a
running softmax in base 2 (FlashAttention-2, arXiv 2307.08691); pages that several rows share are read once
for all of them. A tile that was split leaves float32 partial results, which the second launch merges by their
log-sum-exp.

What makes it fast, so that it is not undone by accident: page ids are fetched one block ahead, so that the
loads of keys and values depend on nothing in their own iteration and Triton keeps several blocks in flight;
unfilled page slots are never loaded (the address is clamped to a filled one), so that values need no mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from attention.heads import HeadNorms, Places
from attention.tiles import TileList, Tiling, unpack_sees

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float

# Query rows times heads of a tile: the M of its matrix products. Triton's smallest is 16.
NARROW = 16
WIDE = 64
BLOCK_TOKENS = 64
NUM_WARPS = 4
STAGES = 3
# Multiprocessors of an H100 or H200, each with room for two workers' shared memory.
WORKERS = 2 * 132
LOWEST = -1e30  # where a running maximum starts: finite, as inf - inf is not a number
# Partial results that the merge reads at once, and heads of one program.
MERGE_PARTS = 8
MERGE_HEADS = 4
ENTER_HEADS = 8  # heads of one row that a program normalises, rotates and writes


def tiling(heads: int, kv_heads: int, page_size: int, *, alone: bool = False) -> Tiling:
    """How these kernels cut a step into tiles; `alone`: a row's result does not depend on the other rows."""
    group = heads // kv_heads
    return Tiling(
        page_size=page_size,
        kv_heads=kv_heads,
        narrow_rows=max(1, NARROW // group),
        wide_rows=max(1, WIDE // group),
        block_pages=max(1, BLOCK_TOKENS // page_size),
        workers=WORKERS,
        alone=alone,
    )


def supports(head_dim: int, dtype: Any) -> bool:
    """Whether these kernels take a model's head size and type."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0 and jnp.dtype(dtype).itemsize <= 4


def attend(
    q: Float[Array, "rows heads head_dim"],
    k_pages: Float[Array, "pages kv_heads page_size head_dim"],
    v_pages: Float[Array, "pages kv_heads page_size head_dim"],
    tiles: TileList,
    *,
    scale: float,
    alone: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "rows heads head_dim"], Float[Array, "rows heads"]]:
    """See `attention.shared_prefix_attention`. `alone`: as in the tiling. `interpret`: without a GPU, slowly.

    Raises:
      ValueError: head_dim or the type is not supported, page_size is not a power of two from 2 on, or the
        pages have more elements than the kernel's 32-bit offsets reach.
    """
    rows, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    if not supports(head_dim, q.dtype):
        raise ValueError(
            f"the GPU kernels need a head_dim that is a power of two, 16 or more, and up to 32 bits: not "
            f"{head_dim}, {q.dtype}"
        )
    if page_size < 2 or page_size & (page_size - 1):
        raise ValueError(f"the GPU kernels need a page_size that is a power of two, not {page_size}")
    if k_pages.size > 2**31:
        raise ValueError(f"the GPU kernels reach 2**31 elements of keys, not {k_pages.size} {k_pages.shape}")

    slots = tiles.part_slots.shape[0]
    partial_type = jnp.promote_types(jnp.float32, q.dtype)
    shape = jax.ShapeDtypeStruct
    cut = tiling(heads, kv_heads, page_size, alone=alone)
    kernel = partial(_tiles_kernel, tiling=cut, scale=scale, interpret=interpret)
    out, lse, part_out, part_lse = _call(
        kernel,
        grid=(min(2 * WORKERS, tiles.tile_rows.shape[0] * kv_heads),),
        out_shape=(
            shape(q.shape, q.dtype),
            shape((rows, heads), partial_type),
            shape((slots, heads, head_dim), partial_type),
            shape((slots, heads), partial_type),
        ),
        num_warps=NUM_WARPS,
        num_stages=STAGES if q.dtype.itemsize <= 2 else 1,
        interpret=interpret,
    )(
        q,
        k_pages,
        v_pages,
        tiles.tile_rows,
        tiles.tile_whole,
        tiles.tile_masked,
        tiles.tile_part,
        tiles.part_slots,
        tiles.page_ids,
        tiles.page_sees,
        tiles.num_tiles.reshape(1),
    )
    out, lse = _call(
        _merge_kernel,
        grid=(rows, pl.cdiv(heads, MERGE_HEADS)),
        out_shape=(shape(q.shape, q.dtype), shape((rows, heads), partial_type)),
        num_warps=4,
        interpret=interpret,
        input_output_aliases={3: 0, 4: 1},
    )(part_out, part_lse, tiles.row_parts, out, lse)
    return out, lse


def enter(
    qkv: Float[Array, "rows all_heads head_dim"],
    norms: HeadNorms | None,
    angles: tuple[Float[Array, "rows pairs"], Float[Array, "rows pairs"]],
    k_pages: Float[Array, "pages kv_heads page_size head_dim"],
    v_pages: Float[Array, "pages kv_heads page_size head_dim"],
    places: Places,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """See `attention.enter`: one launch, in which a program takes a few heads of one row."""
    rows, _, head_dim = qkv.shape
    kv_heads = k_pages.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    scales = () if norms is None else (norms.q_scale, norms.k_scale)
    arguments = (qkv, *angles, *places, *scales, k_pages, v_pages)
    shape = jax.ShapeDtypeStruct
    return _call(
        partial(_enter_kernel, eps=None if norms is None else norms.eps),
        grid=(rows, pl.cdiv(heads, ENTER_HEADS) + pl.cdiv(kv_heads, ENTER_HEADS)),
        out_shape=(
            shape((rows, heads, head_dim), qkv.dtype),
            shape(k_pages.shape, k_pages.dtype),
            shape(v_pages.shape, v_pages.dtype),
        ),
        num_warps=4,
        interpret=interpret,
        input_output_aliases={len(arguments) - 2: 1, len(arguments) - 1: 2},
    )(*arguments)


def _call(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int = 1, **arguments: Any
) -> Callable[..., Any]:
    """pallas_call over whole arrays, addressed by the kernel itself."""
    params = plt.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, compiler_params=params, **arguments)


# --- the tiles ---------------------------------------------------------------------------------------------


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
    out_ref,
    lse_ref,
    part_out_ref,
    part_lse_ref,
    *,
    tiling: Tiling,
    scale: float,
    interpret: bool,
) -> None:
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
    exp2 = partial(_exp2, to_base_2, fast=not interpret and accumulate == jnp.float32)

    def run(tile: Array, head: Array, lanes: int) -> None:
        first_row, count = tile_rows_ref[tile, 0], tile_rows_ref[tile, 1]
        lane = jnp.arange(lanes, dtype=jnp.int32)
        row = lane // group
        in_tile = row < count
        q_row, q_head = first_row + row, head * group + lane % group
        part = tile_part_ref[tile]
        parted, slots = in_tile & (part >= 0), part_slots_ref.shape[0]
        slot = jnp.where(parted, part_slots_ref[jnp.clip(part + row, 0, slots - 1)], slots)
        query = q_ref[jnp.minimum(q_row, q_ref.shape[0] - 1)[:, None], q_head[:, None], dims[None, :]]

        def refs(list_ref, block: Array) -> tuple[Array, Array]:
            """Page references of a block of a list, and which of its positions are not past the end."""
            index = block * tiling.block_pages + which
            size = list_ref[tile, 1]
            return list_ref[tile, 0] + jnp.minimum(index, size - 1), index < size

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
            ahead = page_ids_ref[refs(tile_whole_ref, block + 1)[0]]
            listed = refs(tile_whole_ref, block)[1][None, :] if tiling.block_pages > 1 else None
            return add(state, ids, None, listed), ahead

        def masked_block(block: Array, carry):
            state, ids, sees = carry
            ahead, _ = refs(tile_masked_ref, block + 1)
            ids_ahead, sees_ahead = page_ids_ref[ahead], page_sees_ref[ahead]
            valid, first, end, causal = unpack_sees(sees)
            _, listed = refs(tile_masked_ref, block)
            first = jnp.maximum(first, own_offset - causal)
            rows = jnp.where(listed & (own_offset < valid), jnp.maximum(end - first, 0), 0)
            # first <= row < first + rows, in one comparison: a negative difference is a large unsigned one.
            visible = (row[:, None] - first[None, :]).astype(jnp.uint32) < rows[None, :].astype(jnp.uint32)
            state = add(state, ids, jnp.minimum(own_offset, valid - 1), visible)
            return state, ids_ahead, sees_ahead

        state = _nothing_seen(lanes, head_dim, accumulate)
        zero = jnp.int32(0)
        blocks = _ceil_div(tile_whole_ref[tile, 1], tiling.block_pages)
        first_ids = page_ids_ref[jnp.maximum(refs(tile_whole_ref, zero)[0], 0)]
        state, _ = lax.fori_loop(zero, blocks, whole_block, (state, first_ids))
        blocks = _ceil_div(tile_masked_ref[tile, 1], tiling.block_pages)
        first = jnp.maximum(refs(tile_masked_ref, zero)[0], 0)
        first = page_ids_ref[first], page_sees_ref[first]
        state, _, _ = lax.fori_loop(zero, blocks, masked_block, (state, *first))

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
        tile, head = index // tiling.kv_heads, index % tiling.kv_heads
        rows = tile_rows_ref[tile, 1]

        @pl.when(rows > 0)
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


def _exp2(factor: float, x: Array, shift: Array, *, fast: bool) -> Array:
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


def _merge_kernel(part_out_ref, part_lse_ref, row_parts_ref, _out, _lse, out_ref, lse_ref) -> None:
    row = pl.program_id(0)
    first, count = row_parts_ref[row, 0], row_parts_ref[row, 1]
    heads, head_dim = out_ref.shape[1:]
    accumulate = part_lse_ref.dtype
    head = pl.program_id(1) * MERGE_HEADS + jnp.arange(MERGE_HEADS, dtype=jnp.int32)
    read_head = jnp.minimum(head, heads - 1)
    dims = jnp.arange(head_dim, dtype=jnp.int32)
    part = jnp.arange(MERGE_PARTS, dtype=jnp.int32)

    def add(block: Array, state):
        total, highest, acc = state
        index = block * MERGE_PARTS + part
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
        state = _nothing_seen(MERGE_HEADS, head_dim, accumulate)
        state = lax.fori_loop(jnp.int32(0), _ceil_div(count, MERGE_PARTS), add, state)
        out, lse = _finished(*state)
        exists = head < heads
        plt.store(
            out_ref.at[row, head[:, None], dims[None, :]], out.astype(out_ref.dtype), mask=exists[:, None]
        )
        plt.store(lse_ref.at[row, head], lse, mask=exists)


# --- before attention --------------------------------------------------------------------------------------


def _enter_kernel(qkv_ref, cos_ref, sin_ref, page_ref, offset_ref, *refs, eps: float | None) -> None:
    *scale_refs, _k_pages, _v_pages, q_out_ref, k_pages_ref, v_pages_ref = refs
    q_scale_ref, k_scale_ref = scale_refs or (None, None)
    row, block = pl.program_id(0), pl.program_id(1)
    _, heads, head_dim = q_out_ref.shape
    kv_heads, half = k_pages_ref.shape[1], head_dim // 2
    pair = jnp.arange(half, dtype=jnp.int32)
    halves = pair[None, :], pair[None, :] + half
    cos, sin = cos_ref[row, pair], sin_ref[row, pair]
    query_blocks = pl.cdiv(heads, ENTER_HEADS)

    def rotated(head: Array, scale_ref) -> tuple[Array, Array]:
        """The two halves of the heads, normalised and rotated."""
        dtype, wide = qkv_ref.dtype, cos.dtype
        a, b = (qkv_ref[row, head[:, None], dims].astype(wide) for dims in halves)
        if scale_ref is not None:
            mean = ((a * a).sum(axis=1) + (b * b).sum(axis=1)) / head_dim
            shrink = lax.rsqrt(mean + eps)[:, None]
            a = (a * shrink * scale_ref[pair].astype(wide)).astype(dtype).astype(wide)
            b = (b * shrink * scale_ref[pair + half].astype(wide)).astype(dtype).astype(wide)
        return (a * cos - b * sin).astype(dtype), (b * cos + a * sin).astype(dtype)

    def some_heads(count: int, block: Array) -> tuple[Array, Array, Array]:
        """Heads of the block, clamped to those there are; the same; and where they are not clamped."""
        head = block * ENTER_HEADS + jnp.arange(ENTER_HEADS, dtype=jnp.int32)
        exists = jnp.broadcast_to((head < count)[:, None], (ENTER_HEADS, half))
        return jnp.minimum(head, count - 1), head, exists

    @pl.when(block < query_blocks)
    def _() -> None:
        read, head, exists = some_heads(heads, block)
        for dims, new in zip(halves, rotated(read, q_scale_ref), strict=True):
            plt.store(q_out_ref.at[row, head[:, None], dims], new, mask=exists)

    page, offset = page_ref[row], offset_ref[row]

    @pl.when((block >= query_blocks) & (page >= 0) & (page < k_pages_ref.shape[0]))
    def _() -> None:
        read, head, exists = some_heads(kv_heads, block - query_blocks)
        keys = rotated(heads + read, k_scale_ref)
        values = (qkv_ref[row, (heads + kv_heads + read)[:, None], dims] for dims in halves)
        for pages_ref, parts in ((k_pages_ref, keys), (v_pages_ref, values)):
            for dims, new in zip(halves, parts, strict=True):
                new = new.astype(pages_ref.dtype)
                plt.store(pages_ref.at[page, head[:, None], offset, dims], new, mask=exists)
