from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from attention import BACKENDS, Capacity, default_backend, shared_prefix_attention

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
