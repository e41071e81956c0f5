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
            parts = map(placement.parts, page.axes)
            whole = [size * count for size, count in zip(page.shape, parts, strict=True)]
            return placement.abstract(whole, page.dtype, page.axes)

        sizes = page_sizes(config, num_pages, page_size, placement)
        layer = tuple(map(array, backend.pages(sizes, config.head_dim, dtype)))
        return cls((layer,) * config.num_layers)

    def zeros(self) -> KVCache:
        """A cache of these shapes. What a page holds before it is written is never read."""
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self)


def page_sizes(
    config: ModelConfig, num_pages: int, page_size: int, placement: Placement = ON_ONE_DEVICE
) -> Sizes:
    """The sizes of one device's pool of the model's pages, and of what its rows read."""
    return Sizes(
        num_pages=num_pages,
        page_size=page_size,
        heads=config.num_heads // placement.parts("heads"),
        kv_heads=config.num_kv_heads // placement.parts("kv_heads"),
    )


def bytes_per_page(
    backend: Backend, config: ModelConfig, page_size: int, dtype: Any, placement: Placement = ON_ONE_DEVICE
) -> int:
    """Bytes that one page id takes on each device over all layers, keys and values."""
    layer = backend.pages(page_sizes(config, 1, page_size, placement), config.head_dim, dtype)
    return config.num_layers * sum(array.nbytes for array in layer)
