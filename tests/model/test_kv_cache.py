"""The cache has the shapes that programs were compiled for, and takes the bytes that it says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from attention.xla import Xla
from model.kv_cache import KVCache, bytes_per_page
from tests.model.checkpoints import CHECKPOINTS

CONFIG = CHECKPOINTS["qwen3-gqa2-untied-wide-heads-bf16"].config


def test_every_layer_has_its_own_page_arrays() -> None:
    cache = KVCache.abstract(Xla(), CONFIG, 6, 8, jnp.float32).zeros()
    arrays = jax.tree.leaves(cache)
    assert [array.shape for array in arrays] == [(6, 2, 8, 24)] * 6
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == 6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_abstract_cache_is_the_real_one_without_values(dtype: jnp.dtype) -> None:
    abstract = KVCache.abstract(Xla(), CONFIG, 6, 8, dtype)
    cache = abstract.zeros()
    described = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), cache)
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), abstract)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_per_page_is_what_a_page_takes_in_all_layers(dtype: jnp.dtype) -> None:
    cache = KVCache.abstract(Xla(), CONFIG, 6, 8, dtype).zeros()
    assert 6 * bytes_per_page(Xla(), CONFIG, 8, dtype) == sum(
        array.nbytes for array in jax.tree.leaves(cache)
    )
