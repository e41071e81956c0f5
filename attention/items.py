"""ItemBackend: what the backends have in common that read item by item, as `attention.layout` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from attention.backend import Backend, Sizes
from attention.heads import group_size, write
from attention.layout import ItemCapacity, lay_out_items, padded

if TYPE_CHECKING:
    import numpy as np
    from jax import Array
    from jaxtyping import Int, Int32

    from attention.layout import WorkList
    from attention.reads import Reads


class ItemBackend(Backend):
    """Keys and values in arrays of their own, written by plain JAX operations."""

    __slots__ = ()

    def capacity(self, rows: int, sizes: Sizes, pages_per_read: int | None = None) -> ItemCapacity:
        group_size(sizes.heads, sizes.kv_heads)
        return ItemCapacity.for_bucket(
            rows, sizes.num_pages, sizes.page_size, pages_per_read, paths=sizes.paths
        )

    def lay_out(self, reads: Reads, capacity: Any) -> tuple[Int[np.ndarray, " reads"], WorkList]:
        order, work = lay_out_items(reads, capacity)
        return order, padded(work, capacity.empty())

    def lay_out_unpadded(self, reads: Reads, capacity: Any) -> tuple[Int[np.ndarray, " reads"], WorkList]:
        return lay_out_items(reads, capacity)

    def write(self, qkv: Array, norms: Any, angles: Any, pages: Any, places: Any) -> tuple[Array, Any]:
        return write(qkv, norms, angles, pages, places)

    def refill(self, work: WorkList, filled: Int32[Array, " pages"]) -> WorkList:
        valid = filled[work.page_ids]
        return work._replace(page_valid=jnp.where(valid < 0, work.page_valid, valid))
