"""Attention of ragged query rows over shared, paged KV.

One signature for every backend. What the rows read is a work list (`attention.layout`); a backend knows
arrays and work items, and nothing of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from attention import reference, xla
from attention.layout import Capacity, Read, WorkList, plan_rows

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int32

__all__ = [
    "BACKENDS",
    "Capacity",
    "Read",
    "WorkList",
    "default_backend",
    "plan_rows",
    "shared_prefix_attention",
    "write_kv",
]

BACKENDS = {"reference": reference.attend, "xla": xla.attend}


def default_backend() -> str:
    """The backend for the devices that JAX runs on."""
    return "xla"


@overload
def shared_prefix_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    work: WorkList,
    *,
    scale: float,
    backend: str,
    return_lse: Literal[False] = False,
) -> Array: ...
@overload
def shared_prefix_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    work: WorkList,
    *,
    scale: float,
    backend: str,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...
def shared_prefix_attention(
    q: Float[Array, "rows heads head_dim"],
    k_pages: Float[Array, "pages kv_heads page_size head_dim"],
    v_pages: Float[Array, "pages kv_heads page_size head_dim"],
    work: WorkList,
    *,
    scale: float,
    backend: str,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Softmax attention of every row over the positions that the work list gives it.

    Returns [rows, heads, head_dim] in q's dtype and, if asked, the natural log-sum-exp of the scaled scores
    [rows, heads]. Sums are kept in max(float32, q's dtype). Query head h reads KV head h // (heads //
    kv_heads). Rows without an item give zeros and -inf. Page slots that no item reads may hold anything,
    NaN included.

    Raises:
      ValueError: no such backend, or heads is not a multiple of kv_heads.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no attention backend {backend!r}; there are {', '.join(BACKENDS)}")
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k_pages.shape[1]} KV heads evenly")
    out, lse = BACKENDS[backend](q, k_pages, v_pages, work, scale=scale)
    return (out, lse) if return_lse else out


def write_kv(
    k_pages: Float[Array, "pages kv_heads page_size head_dim"],
    v_pages: Float[Array, "pages kv_heads page_size head_dim"],
    k: Float[Array, "rows kv_heads head_dim"],
    v: Float[Array, "rows kv_heads head_dim"],
    page: Int32[Array, " rows"],
    offset: Int32[Array, " rows"],
) -> tuple[Array, Array]:
    """Write each row's key and value to its page and offset; in place where the pages are donated.

    A page id that is not in the pool (the pool's size, by convention) writes nowhere.
    """
    k_pages = k_pages.at[page, :, offset].set(k.astype(k_pages.dtype), mode="drop")
    v_pages = v_pages.at[page, :, offset].set(v.astype(v_pages.dtype), mode="drop")
    return k_pages, v_pages
