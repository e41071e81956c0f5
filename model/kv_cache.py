"""KVCache: the pages of every layer. Which page holds what is the scheduler's business, not the cache's."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention import Backend, PageArray, Pages, Sizes
from model.config import ModelConfig
from model.sharding import ON_ONE_DEVICE, Placement


class KVCache(NamedTuple):
    """The pages of each layer, in the arrays of an attention backend.

    A pytree; programs take it donated and return it, so there is only ever one.
    """

    layers: tuple[Pages, ...]

    @classmethod
    def abstract(
        cls,
        backend: Backend,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: Any,
        placement: Placement = ON_ONE_DEVICE,
    ) -> KVCache:
        """The cache's shapes, to compile programs from before it exists."""

        def array(page: PageArray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(page.shape, page.dtype, sharding=placement.sharding(page.axes))

        layer = tuple(map(array, _layer(backend, config, num_pages, page_size, dtype)))
        return cls((layer,) * config.num_layers)

    def zeros(self) -> KVCache:
        """A cache of these shapes. What a page holds before it is written is never read."""
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self)


def page_sizes(config: ModelConfig, num_pages: int, page_size: int) -> Sizes:
    """The sizes of a pool of the model's pages, and of what its rows read."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return Sizes(num_pages=num_pages, page_size=page_size, heads=heads, kv_heads=kv_heads)


def bytes_per_page(backend: Backend, config: ModelConfig, page_size: int, dtype: Any) -> int:
    """Bytes that one page id takes over all layers, keys and values."""
    layer = _layer(backend, config, 1, page_size, dtype)
    return config.num_layers * sum(array.nbytes for array in layer)


def _layer(
    backend: Backend, config: ModelConfig, num_pages: int, page_size: int, dtype: Any
) -> tuple[PageArray, ...]:
    return tuple(backend.pages(page_sizes(config, num_pages, page_size), config.head_dim, dtype))
