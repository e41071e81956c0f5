"""Attention in plain XLA operations: what CPU runs, and what any backend can fall back to.

Loops run over work items with run-time counts, so that the time of a step follows the work in its list and
not the list's capacity. Each row carries its online-softmax state (maximum, sum, weighted values), which
every item of the row continues; so there are no partial results to merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.heads import group_size
from attention.items import ItemBackend
from attention.layout import WorkList

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int32

# Tiles measured on two CPU cores at 2-3 KV heads of 32-64: small enough for short tails and small groups,
# large enough that an iteration's fixed cost (some 30 us) is shared.
ITEM_TILE, ITEM_BLOCK = 16, 32  # single-row items in lockstep, KV positions of each per iteration
ROW_TILE, ROW_BLOCK = 16, 128  # rows of one item together, KV positions per iteration


class Softmax(NamedTuple):
    """Online-softmax state: the maximum score, the sum of exponentials, and the sum weighted by values."""

    maximum: Float[Array, "*shape"]
    total: Float[Array, "*shape"]
    values: Float[Array, "*shape head_dim"]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: np.dtype) -> Softmax:
        lowest = jnp.finfo(dtype).min  # finite: -inf - -inf would be NaN
        return cls(jnp.full(shape[:-1], lowest, dtype), jnp.zeros(shape[:-1], dtype), jnp.zeros(shape, dtype))

    def add(
        self, scores: Float[Array, "*shape positions"], values: Float[Array, "... positions head_dim"]
    ) -> Softmax:
        maximum = jnp.maximum(self.maximum, scores.max(-1))
        weights = jnp.exp(scores - maximum[..., None])
        fade = jnp.exp(self.maximum - maximum)
        return Softmax(
            maximum,
            self.total * fade + weights.sum(-1),
            self.values * fade[..., None] + jnp.matmul(weights, values, precision="highest"),
        )

    def finish(self) -> tuple[Float[Array, "*shape head_dim"], Float[Array, "*shape"]]:
        """The weighted mean of the values and the log-sum-exp of the scores: zero and -inf of nothing."""
        some = self.total > 0
        total = jnp.where(some, self.total, 1)
        return self.values / total[..., None], jnp.where(some, self.maximum + jnp.log(total), -jnp.inf)


@dataclass(frozen=True, slots=True)
class Xla(ItemBackend):
    @property
    def name(self) -> str:
        return "xla"

    def attend(
        self, q: Array, pages: Sequence[Array], work: WorkList, *, scale: float
    ) -> tuple[Array, Array]:
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        (rows, heads, head_dim), kv_heads = q.shape, pages[0].shape[1]
        k_pages, v_pages = pages
        reader = _Reader(k_pages, v_pages, WorkList(*map(jnp.asarray, work)))
        query = (q.astype(dtype) * scale).reshape(rows, kv_heads, group_size(heads, kv_heads), head_dim)
        state = Softmax.empty(query.shape, dtype)
        state = reader.read_single_rows(state, query)
        state = reader.read_row_tiles(state, query)
        out, lse = state.finish()
        return out.reshape(q.shape).astype(q.dtype), lse.reshape(rows, heads)


class _Reader(NamedTuple):
    k_pages: Float[Array, "pages kv_heads page_size head_dim"]
    v_pages: Float[Array, "pages kv_heads page_size head_dim"]
    work: WorkList

    def read_single_rows(
        self, state: Softmax, query: Float[Array, "rows kv_heads group head_dim"]
    ) -> Softmax:
        """Private tails: ITEM_TILE items of one row each, in lockstep over blocks of their pages."""
        work, rows = self.work, query.shape[0]

        def tile(index: Array, state: Softmax) -> Softmax:
            item = index * ITEM_TILE + _range(ITEM_TILE)
            live = item < work.num_single
            first, count = work.item_pages.at[item].get(mode="clip").T
            row = jnp.where(live, work.item_rows[:, 0].at[item].get(mode="clip"), rows)
            mine = Softmax(*(x.at[row].get(mode="clip") for x in state))
            lanes = query.at[row].get(mode="clip")
            mine = self.read_blocks(mine, lanes, first, jnp.where(live, count, 0), None, ITEM_BLOCK)
            return Softmax(*(x.at[row].set(y, mode="drop") for x, y in zip(state, mine, strict=True)))

        return lax.fori_loop(np.int32(0), _ceil_div(work.num_single, ITEM_TILE), tile, state)

    def read_row_tiles(self, state: Softmax, query: Float[Array, "rows kv_heads group head_dim"]) -> Softmax:
        """Shared pages and prompt chunks: one item at a time, ROW_TILE of its rows at a time."""
        work = self.work
        rows, kv_heads, group, _ = query.shape
        size = min(ROW_TILE, rows)

        def lanes_of(x: Array, start: Array) -> Array:
            """[rows, kv_heads, group, ...] to [1, kv_heads, size * group, ...]"""
            x = lax.dynamic_slice_in_dim(x, start, size).swapaxes(0, 1)
            return x.reshape(1, kv_heads, size * group, *x.shape[3:])

        def put_lanes(x: Array, lanes: Array, start: Array) -> Array:
            lanes = lanes.reshape(kv_heads, size, *x.shape[2:]).swapaxes(0, 1)
            return lax.dynamic_update_slice_in_dim(x, lanes, start, 0)

        def read_item(item: Array, state: Softmax) -> Softmax:
            first_row, row_count = work.item_rows[item]
            first, count = work.item_pages[item, :, None]

            def tile(index: Array, state: Softmax) -> Softmax:
                start = jnp.minimum(first_row + index * size, rows - size)
                row = start + _range(size) - first_row
                mine = (index * size <= row) & (row < row_count)
                sees = jnp.where(mine, work.item_causal[item] + 1 + row, 0)
                sees = jnp.broadcast_to(sees[:, None], (size, group)).reshape(1, -1)
                part = Softmax(*(lanes_of(x, start) for x in state))
                part = self.read_blocks(part, lanes_of(query, start), first, count, sees, ROW_BLOCK)
                return Softmax(*(put_lanes(x, y, start) for x, y in zip(state, part, strict=True)))

            return lax.fori_loop(np.int32(0), _ceil_div(row_count, size), tile, state)

        return lax.fori_loop(work.num_single, work.num_items, read_item, state)

    def read_blocks(
        self,
        state: Softmax,
        query: Float[Array, "items kv_heads lanes head_dim"],
        first: Int32[Array, " items"],
        count: Int32[Array, " items"],
        sees: Int32[Array, "items lanes"] | None,
        block_tokens: int,
    ) -> Softmax:
        """Continue the lanes' states with their items' pages: references first[i] .. first[i] + count[i].

        Lane (i, n) sees the first sees[i, n] filled positions of them; without `sees`, all of them.
        """
        page_size = self.k_pages.shape[2]
        pages = max(1, block_tokens // page_size)

        def block(index: Array, carry: tuple[Softmax, Array]) -> tuple[Softmax, Array]:
            state, before = carry
            ref = index * pages + _range(pages)
            ids = self.work.page_ids.at[first[:, None] + ref].get(mode="clip")
            valid = self.work.page_valid.at[first[:, None] + ref].get(mode="clip")
            valid = jnp.where(ref < count[:, None], valid, 0)
            filled = _range(page_size) < valid[:, :, None]
            visible = filled.reshape(len(first), 1, 1, pages * page_size)
            if sees is not None:
                position = jnp.cumsum(filled.reshape(len(first), -1), axis=1, dtype=jnp.int32)
                visible &= (before[:, None] + position)[:, None, None] <= sees[:, None, :, None]
                before = before + valid.sum(1, dtype=jnp.int32)
            k = _gather(self.k_pages, ids, query.dtype)
            scores = jnp.matmul(query, k.swapaxes(-1, -2), precision="highest")
            v = lax.cond(
                filled.all(),
                lambda: _gather(self.v_pages, ids, query.dtype),
                # Unfilled slots may hold NaN, and 0 * NaN is NaN.
                lambda: jnp.where(
                    filled.reshape(len(first), 1, pages * page_size, 1),
                    _gather(self.v_pages, ids, query.dtype),
                    0,
                ),
            )
            return state.add(jnp.where(visible, scores, -jnp.inf), v), before

        blocks = _ceil_div(count.max(), pages)
        return lax.fori_loop(np.int32(0), blocks, block, (state, jnp.zeros_like(first)))[0]


def _gather(
    pages: Float[Array, "pages kv_heads page_size head_dim"], ids: Int32[Array, "items refs"], dtype: np.dtype
) -> Float[Array, "items kv_heads positions head_dim"]:
    """The pages of each item end to end, heads first: one copy, without a transpose after it."""
    num_pages, kv_heads, page_size, head_dim = pages.shape
    tile = ids[:, None] * kv_heads + _range(kv_heads)[:, None]
    taken = pages.reshape(num_pages * kv_heads, page_size * head_dim).at[tile].get(mode="clip")
    return taken.reshape(len(ids), kv_heads, ids.shape[1] * page_size, head_dim).astype(dtype)


def _range(n: int) -> Int32[Array, " n"]:
    return jnp.arange(n, dtype=jnp.int32)


def _ceil_div(n: Int32[Array, ""], d: int) -> Int32[Array, ""]:
    return (n + (d - 1)) // d
