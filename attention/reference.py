"""The oracle: masks over all page positions, then softmax. Slow, and meant to be obviously right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from attention.heads import group_size
from attention.items import ItemBackend
from attention.layout import WorkList

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool


@dataclass(frozen=True, slots=True)
class Reference(ItemBackend):
    @property
    def name(self) -> str:
        return "reference"

    def attend(
        self, q: Array, pages: Sequence[Array], work: WorkList, *, scale: float
    ) -> tuple[Array, Array]:
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        (rows, heads, head_dim), (_, kv_heads, page_size, _) = q.shape, pages[0].shape
        visible = visible_positions(work, rows, page_size)
        filled = visible.any(0)
        k, v = (jnp.where(filled[:, None, :, None], x[work.page_ids], 0).astype(dtype) for x in pages)
        grouped = q.astype(dtype).reshape(rows, kv_heads, group_size(heads, kv_heads), head_dim) * scale
        scores = jnp.einsum("rhgd,nhpd->rhgnp", grouped, k, precision="highest")
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=(-2, -1))
        weights = jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None, None])
        out = jnp.einsum("rhgnp,nhpd->rhgd", weights, v, precision="highest")
        return out.reshape(q.shape).astype(q.dtype), lse.reshape(rows, heads)


def visible_positions(work: WorkList, rows: int, page_size: int) -> Bool[Array, "rows page_refs page_size"]:
    """Which positions of which page references each row reads."""
    row = jnp.arange(rows, dtype=jnp.int32)[:, None, None]
    ref = jnp.arange(work.page_ids.shape[0], dtype=jnp.int32)[:, None]
    slot = jnp.arange(page_size, dtype=jnp.int32)
    page_valid = jnp.asarray(work.page_valid)
    before = jnp.cumsum(page_valid, dtype=jnp.int32) - page_valid

    def add_item(item: Array, visible: Array) -> Array:
        first_ref, refs = work.item_pages[item]
        first_row, count = work.item_rows[item]
        index = before[:, None] - before[first_ref] + slot
        seen = (first_ref <= ref) & (ref < first_ref + refs) & (slot < page_valid[:, None])
        seen &= (first_row <= row) & (row < first_row + count)
        return visible | (seen & (index <= work.item_causal[item] + row - first_row))

    work = WorkList(*map(jnp.asarray, work))
    nothing = jnp.zeros((rows, work.page_ids.shape[0], page_size), bool)
    return lax.fori_loop(jnp.int32(0), work.num_items, add_item, nothing)
