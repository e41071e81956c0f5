from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import BACKENDS, Capacity, default_backend, shared_prefix_attention, write_kv

POOL = (6, 2, 4, 3)  # pages, kv_heads, page_size, head_dim


def test_the_default_backend_exists() -> None:
    assert default_backend(128, jnp.bfloat16) in BACKENDS


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    work = Capacity(rows=1, items=2, page_refs=1).empty()
    with pytest.raises(ValueError, match=r"'cuda'.*reference, xla"):
        shared_prefix_attention(
            jnp.zeros((1, 2, 3)), jnp.zeros(POOL), jnp.zeros(POOL), work, scale=1.0, backend="cuda"
        )


def test_query_heads_must_be_a_multiple_of_kv_heads() -> None:
    work = Capacity(rows=1, items=2, page_refs=1).empty()
    with pytest.raises(ValueError, match="3 query heads"):
        shared_prefix_attention(
            jnp.zeros((1, 3, 3)), jnp.zeros(POOL), jnp.zeros(POOL), work, scale=1.0, backend="xla"
        )


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_log_sum_exp_is_returned_on_request(backend: str) -> None:
    work = Capacity(rows=1, items=2, page_refs=1).empty()
    arguments = jnp.zeros((1, 2, 3)), jnp.zeros(POOL), jnp.zeros(POOL), work
    out = shared_prefix_attention(*arguments, scale=1.0, backend=backend)
    both = shared_prefix_attention(*arguments, scale=1.0, backend=backend, return_lse=True)
    np.testing.assert_array_equal(out, both[0])
    assert both[1].shape == (1, 2)


def test_keys_and_values_are_written_to_their_slots_and_nowhere_else() -> None:
    k, v = (jax.random.normal(jax.random.key(seed), (3, 2, 3)) for seed in (1, 2))
    page, offset = jnp.array([4, 6, 0], jnp.int32), jnp.array([3, 1, 2], jnp.int32)
    k_pages, v_pages = write_kv(jnp.zeros(POOL), jnp.zeros(POOL), k, v, page, offset, backend="xla")
    for pages, rows in ((k_pages, k), (v_pages, v)):
        expected = np.zeros(POOL, np.float32)
        expected[4, :, 3], expected[0, :, 2] = rows[0], rows[2]  # page 6 is not in the pool
        np.testing.assert_array_equal(pages, expected)


def test_a_donated_pool_is_written_in_place() -> None:
    k_pages, v_pages = jnp.zeros(POOL), jnp.zeros(POOL)
    before = {k_pages.unsafe_buffer_pointer(), v_pages.unsafe_buffer_pointer()}
    rows, index = jnp.ones((1, 2, 3)), jnp.zeros(1, jnp.int32)
    write = jax.jit(partial(write_kv, backend="xla"), donate_argnums=(0, 1))
    after = write(k_pages, v_pages, rows, rows, index, index)
    assert {pages.unsafe_buffer_pointer() for pages in after} == before


def test_writes_take_the_pool_dtype() -> None:
    pool = jnp.zeros(POOL, jnp.bfloat16)
    index = jnp.zeros(1, jnp.int32)
    rows = jnp.ones((1, 2, 3))
    k_pages, v_pages = write_kv(pool, pool, rows, rows, index, index, backend="xla")
    assert k_pages.dtype == v_pages.dtype == jnp.bfloat16
