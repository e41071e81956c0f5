"""KVCache: the pages of every layer. Which page holds what is the scheduler's business, not the cache's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.sharding import ON_ONE_DEVICE, Placement

if TYPE_CHECKING:
    from jaxtyping import Float

PAGE_AXES = ("pages", "kv_heads", "page", "head_dim")


class KVCache(NamedTuple):
    """(k_pages, v_pages) per layer, each [pages, kv_heads, page_size, head_dim].

    A pytree; programs take it donated and return it, so there is only ever one.
    """

    layers: tuple[
        tuple[
            Float[Any, "pages kv_heads page_size head_dim"],
            Float[Any, "pages kv_heads page_size head_dim"],
        ],
        ...,
    ]

    @classmethod
    def abstract(
        cls,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: Any,
        placement: Placement = ON_ONE_DEVICE,
    ) -> KVCache:
        """The cache's shapes, to compile programs from before it exists."""
        sharding = placement.sharding(PAGE_AXES)
        shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
        pages = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return cls(((pages, pages),) * config.num_layers)

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: Any,
        placement: Placement = ON_ONE_DEVICE,
    ) -> KVCache:
        """A cache of zeros. What a page holds before it is written is never read."""
        abstract = cls.abstract(config, num_pages, page_size, dtype, placement)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), abstract)

    @property
    def num_pages(self) -> int:
        return self.layers[0][0].shape[0]

    @property
    def page_size(self) -> int:
        return self.layers[0][0].shape[2]


def bytes_per_page(config: ModelConfig, page_size: int, dtype: Any) -> int:
    """Bytes that one page id takes over all layers, keys and values."""
    return (
        2 * config.num_layers * config.num_kv_heads * page_size * config.head_dim * jnp.dtype(dtype).itemsize
    )
