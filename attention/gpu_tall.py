"""The kernel of tall tiles on a Hopper GPU: Pallas, lowered by Mosaic GPU, over tiles of `attention.tiles`.

A tall tile has twice the lanes (rows times query heads of a KV head) of a wide one, and a multiprocessor to
itself. Triton's kernel runs a block's two matrix products and the softmax between them one after the other.
Here groups of four warps have roles (FlashAttention-3, arXiv 2407.08608): one copies pages into a ring of
buffers in shared memory, and two take half of the lanes each. They take turns: while one multiplies, the
other runs its softmax. Who has the turn begins the scores of a block and the values of the block before it
at once, so that the tensor cores wait for nothing in between.

What makes it fast, so that it is not undone by accident: the warps that copy share the pages, as beginning a
copy takes a warp long; queries come 16 bytes a thread; nothing in the loop over whole blocks is masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu

from attention.gpu_tall_lanes import TRANSFORMS, clear_rows, load_lanes, store_lanes
from attention.tiles import TileList, Tiling, pack_sees, unpack_sees

if TYPE_CHECKING:
    from jax import Array

LANES = 128  # of a tall tile
HALF = LANES // 2  # of a group of warps: the M of its matrix products
COMPUTING, COPYING = 2, 1  # groups of warps, by what they do
BLOCK_TOKENS = 128  # positions that are multiplied at once
STAGES = 2  # blocks of keys, and of values, in shared memory
COMPUTING_REGISTERS, COPYING_REGISTERS = 232, 40  # of a thread; 2**16 in all
SCORES = mgpu.WGMMAAccumulatorRef((HALF, BLOCK_TOKENS), jnp.float32)
LOWEST = -1e30  # where a running maximum starts: finite, as inf - inf is not a number


@partial(jax.jit, static_argnames=("tiling", "scale"))  # of all layers, one lowering: it takes half a second
def attend_tall(
    q: Array, pages: Sequence[Array], tiles: TileList, tiling: Tiling, *, scale: float
) -> tuple[Array, Array, Array, Array]:
    """What the tall tiles compute, which come first in the list.

    Returns outputs, their log-sum-exps, and the same of partial results; where no tall tile writes, they hold
    anything. q and pages are bfloat16, of head_dim 128.
    """
    rows, heads, head_dim = q.shape
    slots, block_pages = tiles.part_slots.shape[0], BLOCK_TOKENS // tiling.page_size
    shape = jax.ShapeDtypeStruct
    smem = partial(mgpu.SMEM, dtype=q.dtype, transforms=TRANSFORMS)
    ring = _Ring(
        smem((STAGES, BLOCK_TOKENS, head_dim)),
        mgpu.Barrier(num_arrivals=block_pages, num_barriers=STAGES),
        mgpu.Barrier(num_arrivals=COMPUTING, num_barriers=STAGES),
    )
    return mgpu.kernel(
        partial(_kernel, tiling=tiling, to_base_2=scale * math.log2(math.e)),
        out_type=(
            shape(q.shape, q.dtype),
            shape((rows, heads), jnp.float32),
            shape((slots, heads, head_dim), jnp.float32),
            shape((slots, heads), jnp.float32),
        ),
        scratch_types=[
            smem((COMPUTING, HALF, head_dim)),
            ring,
            ring,
            mgpu.Barrier(num_barriers=COMPUTING),
        ],
        grid=(tiling.tall_workers,),
        grid_names=("worker",),
        num_threads=COMPUTING + COPYING,
        thread_name="warps",
        compiler_params=mgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,  # no thread reads what another one stored but after commit_smem
            lowering_semantics=mgpu.LoweringSemantics.Lane,
        ),
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
    )


class _Ring(NamedTuple):
    """Blocks in shared memory, [STAGES, BLOCK_TOKENS, head_dim], and the barriers of each."""

    blocks: Any
    filled: Any
    emptied: Any


def _kernel(
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
    out_ref,
    lse_ref,
    part_out_ref,
    part_lse_ref,
    q_smem,
    keys: _Ring,
    values: _Ring,
    turn,
    *,
    tiling: Tiling,
    to_base_2: float,
) -> None:
    warps, worker = lax.axis_index("warps"), lax.axis_index("worker")
    refs = tile_rows_ref, tile_whole_ref, tile_masked_ref, tile_part_ref, page_ids_ref, page_sees_ref
    lists = _Lists(*refs, worker, tiling)
    group = q_ref.shape[1] // tiling.kv_heads

    @pl.when(warps < COMPUTING)
    def _() -> None:
        mgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        computing = _Computing(lists, warps, group, to_base_2, q_smem.at[warps], keys, values, turn)
        pl.when(warps == 1)(lambda: mgpu.barrier_arrive(turn.at[0]))

        def run(tile: _Tile) -> None:
            half = tile.head, computing.first_lane
            load_lanes(group, HALF)(q_ref, computing.q_smem, tile.first_row, *half)
            mgpu.commit_smem()
            found = computing.tile(tile)

            @pl.when(tile.part < 0)
            def _() -> None:
                store = store_lanes(group, parted=False)
                store(*found, out_ref, lse_ref, part_slots_ref, tile.first_row, tile.rows, *half)

            @pl.when(tile.part >= 0)
            def _() -> None:
                store = store_lanes(group, parted=True)
                store(*found, part_out_ref, part_lse_ref, part_slots_ref, tile.part, tile.rows, *half)

        lists.each_tile(run)

    @pl.when(warps == COMPUTING)
    def _() -> None:
        mgpu.set_max_registers(COPYING_REGISTERS, action="decrease")

        @pl.core_map(mgpu.WarpMesh(axis_name="warp"))
        def _() -> None:
            pools = (k_ref, keys), (v_ref, values)
            lists.each_tile(partial(_copy_tile, lists, pools, lax.axis_index("warp")))


# --- the tiles of a worker ----------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A tile as `TileList` lists it, of one KV head; its blocks, and how many its worker had before."""

    head: Array
    first_row: Array
    rows: Array
    first_whole: Array
    whole: Array
    first_masked: Array
    masked: Array
    part: Array
    before: Array
    blocks: Array

    def slot(self, block: Array) -> Array:
        """Where the rings have a block of the tile."""
        return _rem(self.before + block, STAGES)

    def ref(self, index: Array) -> Array:
        """The page reference that comes index-th; past the end, the last."""
        index = jnp.minimum(index, self.whole + self.masked - 1)
        return jnp.where(index < self.whole, self.first_whole + index, self.first_masked + index - self.whole)


@dataclass(frozen=True)
class _Lists:
    """The tile lists of a step, as a worker reads them."""

    tile_rows: Any
    tile_whole: Any
    tile_masked: Any
    tile_part: Any
    page_ids: Any
    page_sees: Any
    worker: Array
    tiling: Tiling

    @property
    def block_pages(self) -> int:
        return BLOCK_TOKENS // self.tiling.page_size

    def each_tile(self, run: Callable[[_Tile], None]) -> None:
        """Runs every pair of a tall tile and a KV head that is this worker's."""
        kv_heads = self.tiling.kv_heads
        pairs = self.tile_rows.shape[0] * kv_heads

        def rows_of(pair: Array) -> Array:
            at = _div(jnp.minimum(pair, pairs - 1), kv_heads)
            return jnp.where(pair < pairs, self.tile_rows[at, 1], 0)

        def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            pair, before, _ = state
            tile = self.tile(_div(pair, kv_heads), _rem(pair, kv_heads), before)
            run(tile)
            pair += self.tiling.tall_workers
            return pair, before + tile.blocks, rows_of(pair)

        first = self.worker, jnp.int32(0), rows_of(self.worker)
        lax.while_loop(lambda state: state[2] > self.tiling.wide_rows, body, first)

    def tile(self, at: Array, head: Array, before: Array) -> _Tile:
        whole, masked = self.tile_whole[at, 1], self.tile_masked[at, 1]
        return _Tile(
            head,
            self.tile_rows[at, 0],
            self.tile_rows[at, 1],
            self.tile_whole[at, 0],
            whole,
            self.tile_masked[at, 0],
            masked,
            self.tile_part[at],
            before,
            _div(whole + masked + (self.block_pages - 1), self.block_pages),
        )

    def ids(self, tile: _Tile, block: Array) -> list[Array]:
        """Pages of a block; past the tile's end, the last."""
        first = block * self.block_pages
        return [self.page_ids[tile.ref(first + page)] for page in range(self.block_pages)]

    def sees(self, tile: _Tile, block: Array) -> list[tuple[Array, Array, Array, Array]]:
        """Who sees what of a block's pages, as `unpack_sees` says it; of a page past the end, nobody."""
        whole, nothing = pack_sees(self.tiling.page_size, 0, np.array([LANES, 0])).tolist()

        def of(index: Array) -> tuple[Array, Array, Array, Array]:
            listed = self.page_sees[tile.ref(index)]
            listed = jnp.where(index < tile.whole + tile.masked, listed, jnp.int32(nothing))
            return unpack_sees(jnp.where(index < tile.whole, jnp.int32(whole), listed))

        return [of(block * self.block_pages + page) for page in range(self.block_pages)]


def _div(n: Array, d: int) -> Array:
    """n // d of what is not negative, in one operation."""
    return lax.div(n, jnp.full_like(n, d) if n.shape else jnp.int32(d))


def _rem(n: Array, d: int) -> Array:
    return lax.rem(n, jnp.full_like(n, d) if n.shape else jnp.int32(d))


# --- the warps that copy ------------------------------------------------------------------------------------


def _copy_tile(lists: _Lists, pools: Sequence[tuple[Any, _Ring]], warp: Array, tile: _Tile) -> None:
    """A warp copies every fourth of the pages of keys and values of each block."""
    page_size, warps = lists.tiling.page_size, 4

    def copy_block(block: Array, ids: list[Array]) -> list[Array]:
        slot, ahead = tile.slot(block), lists.ids(tile, block + 1)

        def copy(pool: Any, ring: _Ring, page: int) -> None:
            to = ring.blocks.at[slot, pl.ds(page * page_size, page_size)]
            mgpu.copy_gmem_to_smem(pool.at[ids[page], tile.head], to, ring.filled.at[slot])

        for number, (pool, ring) in enumerate(pools):
            emptied = partial(mgpu.barrier_wait, ring.emptied.at[slot])
            pl.when(tile.before + block >= STAGES)(emptied)
            for page in range(len(ids)):
                mine = warp == (number * len(ids) + page) % warps
                pl.when(mine)(partial(copy, pool, ring, page))
        return ahead

    lax.fori_loop(jnp.int32(0), tile.blocks, copy_block, lists.ids(tile, jnp.int32(0)))


# --- the warps that compute ---------------------------------------------------------------------------------


class _State(NamedTuple):
    """Of the lanes of a group of warps: the values' weighted sum [HALF, head_dim], the highest score and the
    sum of the weights [HALF]; and the weights of the last block [HALF, BLOCK_TOKENS], whose values `acc` has
    not yet."""

    acc: Array
    highest: Array
    total: Array
    weights: Array


@dataclass(frozen=True)
class _Computing:
    """A group of warps that computes half of the lanes: which one it is, and what it computes with."""

    lists: _Lists
    warps: Array
    group: int
    to_base_2: float
    q_smem: Any
    keys: _Ring
    values: _Ring
    turn: Any

    @property
    def first_lane(self) -> Array:
        return self.warps * HALF

    def tile(self, tile: _Tile) -> tuple[Array, Array]:
        """The weighted means of the values, and the natural log-sum-exps of the scores: zero and -inf of
        nothing."""
        whole = _div(tile.whole, self.lists.block_pages)
        add = partial(self.add_block, tile)
        state = self.first_block(tile)
        state = lax.fori_loop(jnp.int32(1), whole, partial(add, masked=False), state)
        state = lax.fori_loop(jnp.maximum(whole, 1), tile.blocks, partial(add, masked=True), state)
        acc, highest, total, _ = self.add_last_values(tile, state)

        nothing = total == 0
        acc /= lax.broadcast_in_dim(jnp.where(nothing, 1.0, total), acc.shape, [0])
        lse = (highest + jnp.log2(total)) * math.log(2)
        return acc, jnp.where(nothing, -jnp.inf, lse)

    def first_block(self, tile: _Tile) -> _State:
        in_rows = partial(mgpu.layout_cast, new_layout=mgpu.Layout.WGMMA.reduce(1))
        highest = in_rows(jnp.full((HALF,), LOWEST, jnp.float32))
        total = in_rows(jnp.zeros((HALF,), jnp.float32))
        nothing = jnp.zeros(self.q_smem.shape, jnp.float32)
        slot, first = tile.slot(jnp.int32(0)), jnp.int32(0)
        mgpu.barrier_wait(self.keys.filled.at[slot])
        mgpu.barrier_wait(self.turn.at[self.warps])

        def multiply(scores: Any) -> Array:
            mgpu.wgmma(scores, self.q_smem, self.keys.blocks.at[slot].transpose((1, 0)))
            mgpu.barrier_arrive(self.turn.at[1 - self.warps])
            return scores[...]

        scores = pl.run_scoped(multiply, SCORES)
        mgpu.barrier_arrive(self.keys.emptied.at[slot])
        weights, highest, total, _ = self.softmax(self.visible(tile, first, scores), highest, total)
        acc = mgpu.layout_cast(nothing, mgpu.Layout.WGMMA)
        return _State(acc, highest, total, weights.astype(jnp.bfloat16))

    def add_block(self, tile: _Tile, block: Array, state: _State, *, masked: bool) -> _State:
        """The weights of a block; and the values of the block before it, at the same time."""
        slot, earlier = tile.slot(block), tile.slot(block - 1)
        mgpu.barrier_wait(self.keys.filled.at[slot])
        mgpu.barrier_wait(self.values.filled.at[earlier])
        if masked:
            self.clear_unfilled(tile, block - 1)
        mgpu.barrier_wait(self.turn.at[self.warps])

        def begin(acc: Any, scores: Any) -> Array:
            mgpu.wgmma(scores, self.q_smem, self.keys.blocks.at[slot].transpose((1, 0)))
            mgpu.wgmma(acc, state.weights, self.values.blocks.at[earlier])
            mgpu.barrier_arrive(self.turn.at[1 - self.warps])
            return scores[...]

        def multiply(refs: Sequence[Any]) -> None:
            acc, scores = refs
            scores[...] = pl.run_scoped(partial(begin, acc), SCORES)

        nothing = mgpu.layout_cast(jnp.zeros((HALF, BLOCK_TOKENS), jnp.float32), mgpu.Layout.WGMMA)
        begun: Any = (mgpu.WGMMAAccumulatorRef.init(state.acc), nothing)
        acc, scores = pl.run_state(multiply)(begun)
        mgpu.barrier_arrive(self.keys.emptied.at[slot])
        mgpu.barrier_arrive(self.values.emptied.at[earlier])
        if masked:
            scores = self.visible(tile, block, scores)
        weights, highest, total, shrink = self.softmax(scores, state.highest, state.total)
        acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
        return _State(acc, highest, total, weights.astype(jnp.bfloat16))

    def add_last_values(self, tile: _Tile, state: _State) -> _State:
        block = tile.blocks - 1
        slot = tile.slot(block)
        mgpu.barrier_wait(self.values.filled.at[slot])
        self.clear_unfilled(tile, block)

        def multiply(acc: Any) -> None:
            mgpu.wgmma(acc, state.weights, self.values.blocks.at[slot])

        acc = pl.run_state(multiply)(mgpu.WGMMAAccumulatorRef.init(state.acc))
        mgpu.barrier_arrive(self.values.emptied.at[slot])
        return state._replace(acc=acc)

    def softmax(self, scores: Array, highest: Array, total: Array) -> tuple[Array, Array, Array, Array]:
        """Weights of the scores, the highest so far, the sum of weights so far, and by what they shrank."""
        new_highest = jnp.maximum(highest, scores.max(axis=1) * self.to_base_2)
        shrink = jnp.exp2(highest - new_highest)
        shift = lax.broadcast_in_dim(new_highest, scores.shape, [0])
        weights = jnp.exp2(scores * self.to_base_2 - shift)
        return weights, new_highest, total * shrink + weights.sum(axis=1), shrink

    def visible(self, tile: _Tile, block: Array, scores: Array) -> Array:
        """The scores of a block, and -inf where a lane does not see the position."""
        iota = partial(mgpu.broadcasted_iota, jnp.int32, scores.shape, layout=mgpu.Layout.WGMMA)
        row = _div(iota(0) + self.first_lane, self.group)
        page, offset = (op(iota(1), self.lists.tiling.page_size) for op in (_div, _rem))

        def of_page(words: Sequence[Array]) -> Array:
            chosen = jnp.broadcast_to(words[0], page.shape)
            for index, word in enumerate(words[1:], start=1):
                chosen = jnp.where(page == index, word, chosen)
            return chosen

        valid, first, end, causal = map(of_page, zip(*self.lists.sees(tile, block), strict=True))
        seen = (offset < valid) & (first <= row) & (row < end) & (offset <= causal + row)
        return jnp.where(seen, scores, -jnp.inf)

    def clear_unfilled(self, tile: _Tile, block: Array) -> None:
        """Zeroes the values that nobody sees, as a weight of zero times NaN were NaN.

        Both groups of warps write the same zeros, each before its own product.
        """
        filled = [jnp.where(end > 0, valid, 0) for valid, _, end, _ in self.lists.sees(tile, block)]
        clear = clear_rows(self.lists.tiling.page_size, len(filled))
        clear(self.values.blocks.at[tile.slot(block)], *filled)
        mgpu.commit_smem()
