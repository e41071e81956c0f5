"""The kernel of attention on a TPU: Pallas, lowered by Mosaic, over the tiles of `attention.tiles`.

One program a core goes through the core's tiles, and through the blocks of pages of each. A tile's rows times
their query heads per KV head are its *lanes*: the rows of two matrix products for each block, with a running
softmax in base 2 (FlashAttention-2, arXiv 2307.08691); pages that several rows share are read once for all
of them. A core never splits a tile, so that there are no partial results to merge.

What makes it fast, so that it is not undone by accident:

- the pages of a block are on their way `BUFFERS - 1` blocks before they are used, across tiles, and the
  references that say which pages these are one block before that: nothing waits but the first block;
- starting a copy is work of the scalar unit that nothing overlaps, so that it is unrolled;
- one update of the softmax is a chain of dependent steps: it takes as many tokens as a block has, and two
  heads at once where there are two;
- masks cost two comparisons an element: who sees a token is laid out once for all heads and lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.tpu_blocks import Blocks, Copies, Cursor, Masks
from attention.tpu_pages import LANES, value_lane, widened
from attention.tpu_plan import BUFFERS, CHUNK, SUBLANES, CoreTiles, Plan

if TYPE_CHECKING:
    from jax import Array

LOWEST = -1e30  # where a running maximum starts: finite, as inf - inf is not a number
HIDDEN = -3e38  # a score that is not seen, far below LOWEST: its weight is 0 even where nothing was seen


def attend(
    q: Array, pages: Array, work: CoreTiles, plan: Plan, *, scale: float, vmem_limit: int, interpret: Any
) -> tuple[Array, Array]:
    """`attention.backend.Backend.attend` over pages as `attention.tpu_pages` has them."""
    rows, heads, head_dim = q.shape
    kv_heads, group, spare = plan.kv_heads, plan.group, plan.all_lanes - rows * plan.group
    lanes = q.astype(jnp.float32).reshape(rows, kv_heads, group, head_dim).swapaxes(0, 1)
    lanes = jnp.pad(widened(lanes).reshape(kv_heads, rows * group, LANES), ((0, 0), (0, spare), (0, 0)))

    # Kept out of fast memory, where XLA would bring the pages of a whole layer if they fitted.
    pages = pages if interpret else pltpu.with_memory_space_constraint(pages, pltpu.HBM)
    # Of one axis: an index into it is an address, which one instruction adds up.
    near = jnp.concatenate([work.refs[:-1], work.refs[1:]], axis=2).reshape(-1)
    result = jax.ShapeDtypeStruct((plan.cores, *lanes.shape), jnp.float32)
    of_core = pl.BlockSpec((1, *lanes.shape), lambda core, *_: (core, 0, 0, 0))
    hbm, vmem = (pl.BlockSpec(memory_space=space) for space in (pl.ANY, pltpu.VMEM))
    softmax = pltpu.VMEM((kv_heads, plan.window, LANES), jnp.float32)
    seen_by = pltpu.VMEM((1, plan.block_tokens), jnp.int32)
    out, lse = pl.pallas_call(
        partial(_kernel, plan=plan, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(plan.cores,),
            in_specs=[vmem, hbm, hbm],
            out_specs=[of_core, of_core],
            scratch_shapes=[
                pltpu.VMEM((BUFFERS, plan.block_pages, *pages.shape[1:]), pages.dtype),
                pltpu.SMEM((4 * CHUNK * (BUFFERS + 1),), jnp.int32),
                seen_by,
                seen_by,
                softmax,
                softmax,
                softmax,
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SemaphoreType.DMA((BUFFERS + 1,)),
            ],
        ),
        out_shape=[result, result],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if plan.cores > 1 else "arbitrary",),
            vmem_limit_bytes=vmem_limit,
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(plan, work, pages),
        interpret=interpret,
        name="shared_prefix_attention",
    )(work.tiles, work.cores, lanes, near, pages)

    # A row is one core's; the others leave nothing in its place.
    first = value_lane(head_dim)
    out = out.sum(0)[:, : rows * group, first : first + head_dim].reshape(kv_heads, rows, group, head_dim)
    lse = lse.max(0)[:, : rows * group, 0].reshape(kv_heads, rows, group)
    return out.swapaxes(0, 1).reshape(q.shape).astype(q.dtype), lse.swapaxes(0, 1).reshape(rows, heads)


def _cost(plan: Plan, work: CoreTiles, pages: Array) -> pl.CostEstimate:
    """Of a step that fills its bucket, for XLA's scheduler: what is read is known only when it runs."""
    page = pages.size // pages.shape[0]
    refs = min(work.refs.shape[0] * CHUNK, pages.shape[0])
    scores = refs * plan.page_size * plan.kv_heads * plan.variants[-1]
    return pl.CostEstimate(
        flops=4 * scores * LANES,
        transcendentals=scores,
        bytes_accessed=refs * page * plan.itemsize + 3 * plan.kv_heads * plan.all_lanes * LANES * 4,
    )


# --- the kernel --------------------------------------------------------------------------------------------


def _kernel(
    tiles_ref, cores_ref, q_ref, refs_ref, pages_ref, out_ref, lse_ref, *scratch, plan, scale
) -> None:
    core = pl.program_id(0)
    out_ref[...] = jnp.zeros_like(out_ref)
    lse_ref[...] = jnp.full_like(lse_ref, -jnp.inf)
    ring, words, low, high, acc, highest, total, pages_there, words_there = scratch
    blocks = Blocks(plan, tiles_ref, cores_ref[core + 1], refs_ref, words, words_there)
    copies = Copies(plan, blocks, pages_ref, ring, pages_there)
    masks = Masks(plan, blocks, ring, low, high)
    softmax = _Softmax(plan, scale, q_ref, ring, masks, acc, highest, total)

    cursor, near = Cursor(cores_ref[core], jnp.int32(0)), []
    for step in range(BUFFERS):
        block, cursor = blocks.ask(cursor, jnp.int32(step))
        near.append(block)
    for step, block in enumerate(near[:-1]):
        copies.ask(block, jnp.int32(step))

    def one_tile(index: Array, carry):
        tile = blocks.tile(index)
        lane = tile.row * plan.group
        base = lane & -SUBLANES
        window = _Window(base, lane - base, lane - base + tile.rows * plan.group)
        softmax.begin(window)

        def one_block(_: Array, carry):
            step, cursor, (block, *near) = carry
            last, cursor = blocks.ask(cursor, step + BUFFERS)
            copies.ask(near[-1], step + BUFFERS - 1)
            copies.wait(block, step)
            unmasked = jnp.logical_not(block.masked) & (block.pages == plan.block_pages)

            @pl.when(unmasked)
            def _() -> None:
                softmax.add(window, step, masked=False)

            @pl.when(jnp.logical_not(unmasked))
            def _() -> None:
                masks.lay_out(block, step)
                softmax.add(window, step, masked=True)

            return step + 1, cursor, (*near, last)

        carry = lax.fori_loop(0, blocks.count(tile), one_block, carry)
        softmax.finish(window, tile.rows, out_ref, lse_ref)
        return carry

    lax.fori_loop(cores_ref[core], cores_ref[core + 1], one_tile, (jnp.int32(0), cursor, tuple(near)))


class _Window(NamedTuple):
    """Lanes of a tile: its first lane in the queries, and how many lanes before its own that is."""

    base: Array
    before: Array
    lanes: Array


@dataclass(frozen=True, slots=True)
class _Softmax:
    """The running softmax of a tile's lanes: weighted sum of values, maximum and sum of the weights."""

    plan: Plan
    scale: float
    q_ref: Any
    ring: Any
    masks: Masks
    acc: Any
    highest: Any
    total: Any

    def begin(self, window: _Window) -> None:
        def some(start: Array, lanes: int) -> None:
            at = (slice(None), _lanes(start, lanes))
            shape = (self.plan.kv_heads, lanes, LANES)
            self.highest[at] = jnp.full(shape, LOWEST, jnp.float32)
            self.total[at] = self.acc[at] = jnp.zeros(shape, jnp.float32)

        self._over(window, some)

    def add(self, window: _Window, step: Array, *, masked: bool) -> None:
        """The tokens of the core's step-th block, for all heads."""
        slot = lax.rem(step, BUFFERS)

        def some(start: Array, lanes: int) -> None:
            row = self._row(window, start, lanes)

            def some_heads(index: Array, _: None) -> None:
                heads = [index * together + more for more in range(together)]
                new = [
                    self._updated(slot, head, window.base + start, start, lanes, row if masked else None)
                    for head in heads
                ]
                for head, state in zip(heads, new, strict=True):
                    at = (head, _lanes(start, lanes))
                    self.highest[at], self.total[at], self.acc[at] = state

            together = 2 if self.plan.kv_heads % 2 == 0 else 1
            lax.fori_loop(0, self.plan.kv_heads // together, some_heads, None)

        self._over(window, some)

    def finish(self, window: _Window, rows: Array, out_ref: Any, lse_ref: Any) -> None:
        """Stores what belongs to the tile's rows, among lanes that may be its neighbours'."""

        def some(start: Array, lanes: int) -> None:
            row, lane = self._row(window, start, lanes), self._lane(window, start, lanes)
            mine = (lane >= 0) & (row < rows)

            def one_head(head: Array, _: None) -> None:
                at = (head, _lanes(start, lanes))
                to = (0, head, _lanes(window.base + start, lanes))
                total = self.total[at]
                seen = total > 0
                out = self.acc[at] / jnp.where(seen, total, 1.0)
                lse = jnp.where(seen, (self.highest[at] + jnp.log2(total)) * math.log(2), -jnp.inf)
                out_ref[to] = jnp.where(mine, out, out_ref[to])
                lse_ref[to] = jnp.where(mine, lse, lse_ref[to])

            lax.fori_loop(0, self.plan.kv_heads, one_head, None)

        self._over(window, some)

    def _updated(self, slot: Array, head: Array, query: Array, start: Array, lanes: int, row: Array | None):
        plan, dtype = self.plan, self.ring.dtype
        precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
        dot = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        q = self.q_ref[head, _lanes(query, lanes), :].astype(dtype)
        k, v = (
            self.ring[slot, :, head, plane].reshape(plan.block_tokens, LANES)
            for plane in (0, self.ring.shape[3] - 1)
        )
        scores = dot(q, k, (((1,), (1,)), ((), ()))) * (self.scale * math.log2(math.e))
        if row is not None:
            visible = (row[:, :1] >= self.masks.low[...]) & (row[:, :1] < self.masks.high[...])
            scores = jnp.where(visible, scores, HIDDEN)
        at = (head, _lanes(start, lanes))
        before = self.highest[at]
        highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        shrink, weights = jnp.exp2(before - highest), jnp.exp2(scores - highest[:, :1])
        total = self.total[at] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        acc = self.acc[at] * shrink + dot(weights.astype(dtype), v, (((1,), (0,)), ((), ())))
        return highest, total, acc

    def _over(self, window: _Window, some: Callable[[Array, int], None]) -> None:
        """some(start, lanes) over the window, by the smallest variant that has room for all of it."""
        below = 0
        for lanes in self.plan.variants:
            last = lanes == self.plan.variants[-1]

            @pl.when(window.lanes > below if last else (window.lanes > below) & (window.lanes <= lanes))
            def _(lanes: int = lanes, last: bool = last) -> None:
                if last:
                    many = lax.div(window.lanes + (lanes - 1), jnp.int32(lanes))
                    lax.fori_loop(0, many, lambda index, _: some(index * lanes, lanes), None)
                else:
                    some(jnp.int32(0), lanes)

            below = lanes

    def _lane(self, window: _Window, start: Array, lanes: int) -> Array:
        """[lanes, 128]: which lane of the tile each one is; negative before its first."""
        return start - window.before + lax.broadcasted_iota(jnp.int32, (lanes, LANES), 0)

    def _row(self, window: _Window, start: Array, lanes: int) -> Array:
        """[lanes, 128]: which row of the tile each lane belongs to."""
        lane, group = self._lane(window, start, lanes), self.plan.group
        if group & group - 1 == 0:
            return lane >> group.bit_length() - 1
        return ((lane.astype(jnp.float32) + 0.5) * (1.0 / group)).astype(jnp.int32)


def _lanes(start: Array, count: int):
    return pl.ds(pl.multiple_of(start, SUBLANES), count)
