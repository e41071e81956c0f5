"""Attention in plain XLA operations: what CPU runs, and what any backend can fall back to.

Loops run over work items with run-time counts, so that the time of a step follows the work in its list and
not the list's capacity. Each row carries the online-softmax state (maximum, sum, weighted values), which
every item that the row has continues; so there are no partial results to merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.layout import WHOLE, WorkList

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int32

ROW_TILE = 16  # rows of one item that are processed together
ITEM_TILE = 8  # single-row items that are processed together
BLOCK_TOKENS = 128  # KV positions of an item per step of the inner loop
_0 = np.int32(0)


class Softmax(NamedTuple):
    """Online-softmax state: the maximum score, the sum of exponentials, and the sum weighted by values."""

    maximum: Float[Array, "*rows kv_heads group"]
    total: Float[Array, "*rows kv_heads group"]
    values: Float[Array, "*rows kv_heads group head_dim"]

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> Softmax:
        lowest = jnp.finfo(dtype).min  # finite: -inf - -inf would be NaN
        return cls(jnp.full(shape[:-1], lowest, dtype), jnp.zeros(shape[:-1], dtype), jnp.zeros(shape, dtype))


def attend(
    q: Float[Array, "rows heads head_dim"],
    k_pages: Float[Array, "pages kv_heads page_size head_dim"],
    v_pages: Float[Array, "pages kv_heads page_size head_dim"],
    work: WorkList,
    *,
    scale: float,
) -> tuple[Float[Array, "rows heads head_dim"], Float[Array, "rows heads"]]:
    """Attention output in q's dtype and log-sum-exp in the accumulation dtype; see `attention`."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    (rows, heads, head_dim), kv_heads = q.shape, k_pages.shape[1]
    work = WorkList(*map(jnp.asarray, work))
    grouped = (q.astype(dtype) * scale).reshape(rows, kv_heads, heads // kv_heads, head_dim)
    kv = _Pages(k_pages, v_pages, work)

    def single_row_items(tile: Array, state: Softmax) -> Softmax:
        item = tile * ITEM_TILE + _range(ITEM_TILE)
        live = item < work.num_single
        item = jnp.minimum(item, work.item_rows.shape[0] - 1)
        row = jnp.where(live, work.item_rows[item, 0], rows)
        first, count = work.item_pages[item, 0], jnp.where(live, work.item_pages[item, 1], 0)
        whole = jnp.full((ITEM_TILE, 1), WHOLE, jnp.int32)
        return kv.read(state, grouped, row[:, None], first, count, whole)

    def multi_row_item(item: Array, state: Softmax) -> Softmax:
        first_row, row_count = work.item_rows[item, 0], work.item_rows[item, 1]

        def row_tile(tile: Array, state: Softmax) -> Softmax:
            index = tile * ROW_TILE + _range(ROW_TILE)
            row = jnp.where(index < row_count, first_row + index, rows)
            sees = work.item_causal[item] + 1 + index
            return kv.read(state, grouped, row[None], *work.item_pages[item, :, None], sees[None])

        return lax.fori_loop(_0, _ceil_div(row_count, ROW_TILE), row_tile, state)

    state = Softmax.empty(grouped.shape, dtype)
    state = lax.fori_loop(_0, _ceil_div(work.num_single, ITEM_TILE), single_row_items, state)
    state = lax.fori_loop(work.num_single, work.num_items, multi_row_item, state)

    total = state.total[..., None]
    out = jnp.where(total > 0, state.values / jnp.where(total > 0, total, 1), 0)
    lse = jnp.where(state.total > 0, state.maximum + jnp.log(state.total), -jnp.inf)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(rows, heads)


class _Pages(NamedTuple):
    k: Float[Array, "pages kv_heads page_size head_dim"]
    v: Float[Array, "pages kv_heads page_size head_dim"]
    work: WorkList

    def read(
        self,
        state: Softmax,
        q: Float[Array, "all_rows kv_heads group head_dim"],
        row: Int32[Array, "items rows"],
        first: Int32[Array, " items"],
        count: Int32[Array, " items"],
        sees: Int32[Array, "items rows"],
    ) -> Softmax:
        """Continue the state of `row` (each at most once; q's row count: nowhere) with pages of their items.

        Row (i, r) sees the first sees[i, r] filled positions of the references first[i] .. first[i] + count[i].
        """
        page_size = self.k.shape[2]
        pages = max(1, BLOCK_TOKENS // page_size)
        dtype = q.dtype
        mine = Softmax(*(_heads_first(x.at[row].get(mode="clip")) for x in state))
        query = _heads_first(q.at[row].get(mode="clip"))
        group = q.shape[2]

        def block(index: Array, carry: tuple[Softmax, Array]) -> tuple[Softmax, Array]:
            mine, before = carry
            ref = index * pages + _range(pages)
            live = ref < count[:, None]
            ref = first[:, None] + ref
            ids = self.work.page_ids.at[ref].get(mode="clip")
            valid = jnp.where(live, self.work.page_valid.at[ref].get(mode="clip"), 0)
            ends = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
            slot = _range(page_size)
            filled = slot < valid[..., None]
            position = (before[:, None] + ends - valid)[..., None] + slot
            visible = filled[:, None] & (position[:, None] < sees[:, :, None, None])
            k = self.k.at[ids].get(mode="clip").astype(dtype)
            v = self.v.at[ids].get(mode="clip").astype(dtype)
            v = jnp.where(filled[:, :, None, :, None], v, 0)
            visible = jnp.broadcast_to(visible[:, :, None], (*visible.shape[:2], group, *visible.shape[2:]))
            visible = visible.reshape(visible.shape[0], 1, -1, pages * page_size)
            return _attend_block(mine, query, k, v, visible), before + ends[:, -1]

        blocks = _ceil_div(count.max(), pages)
        mine, _ = lax.fori_loop(_0, blocks, block, (mine, jnp.zeros_like(first)))
        return Softmax(
            *(x.at[row].set(_rows_first(y, row.shape[1]), mode="drop") for x, y in zip(state, mine))
        )


def _attend_block(mine, query, k, v, visible):
    items, pages, kv_heads, page_size, head_dim = k.shape
    k = k.transpose(0, 2, 1, 3, 4).reshape(items, kv_heads, pages * page_size, head_dim)
    v = v.transpose(0, 2, 1, 3, 4).reshape(items, kv_heads, pages * page_size, head_dim)
    scores = jnp.einsum("ihrd,ihpd->ihrp", query, k, precision="highest")
    scores = jnp.where(visible, scores, -jnp.inf)
    maximum = jnp.maximum(mine.maximum, scores.max(-1))
    weights = jnp.exp(scores - maximum[..., None])
    fade = jnp.exp(mine.maximum - maximum)
    values = jnp.einsum("ihrp,ihpd->ihrd", weights, v, precision="highest")
    return Softmax(maximum, mine.total * fade + weights.sum(-1), mine.values * fade[..., None] + values)


def _heads_first(x):
    """[items, rows, kv_heads, group, ...] -> [items, kv_heads, rows * group, ...]"""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _rows_first(x, rows):
    x = x.reshape(*x.shape[:2], rows, -1, *x.shape[3:])
    return jnp.moveaxis(x, 1, 2)


def _range(n):
    return jnp.arange(n, dtype=jnp.int32)


def _ceil_div(n, d: int):
    return (n + (d - 1)) // d
