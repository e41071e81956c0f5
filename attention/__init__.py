"""Attention of ragged query rows over shared, paged KV.

One signature for every backend. What the rows read is planned on the host, as work items
(`attention.layout`) or as tiles for a GPU (`attention.tiles`); a backend knows arrays and work, and nothing
of requests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import jax

from attention import gpu, heads, reference, xla
from attention.heads import HeadNorms, Places
from attention.layout import Capacity, WorkList, plan_rows
from attention.reads import Read, Reads, Segment
from attention.tile_planner import plan_tiles
from attention.tiles import TileCapacity, TileList, Tiling

if TYPE_CHECKING:
    import numpy as np
    from jax import Array
    from jaxtyping import Float, Int

__all__ = [
    "BACKENDS",
    "Capacity",
    "HeadNorms",
    "Places",
    "Read",
    "Reads",
    "Segment",
    "TileCapacity",
    "TileList",
    "WorkList",
    "capacity",
    "default_backend",
    "enter",
    "plan",
    "plan_rows",
    "shared_prefix_attention",
]


class Backend(NamedTuple):
    """tiling: from (heads, kv_heads, page_size), of a backend that takes a TileList instead of a WorkList."""

    enter: Callable[..., tuple[Array, Array, Array]]
    attend: Callable[..., tuple[Array, Array]]
    tiling: Callable[..., Tiling] | None = None


BACKENDS = {
    "reference": Backend(heads.enter, reference.attend),
    "xla": Backend(heads.enter, xla.attend),
    "gpu": Backend(gpu.enter, gpu.attend, gpu.tiling),
    # What a row computes does not depend on the other rows: docs/schedule-invariance.md.
    "gpu-alone": Backend(gpu.enter, partial(gpu.attend, alone=True), partial(gpu.tiling, alone=True)),
    "gpu-interpreted": Backend(
        partial(gpu.enter, interpret=True), partial(gpu.attend, interpret=True), gpu.tiling
    ),
}


def default_backend(head_dim: int, dtype: Any) -> str:
    """The backend for the devices that JAX runs on, a model's head size and its type."""
    return "gpu" if jax.default_backend() == "gpu" and gpu.supports(head_dim, dtype) else "xla"


def capacity(
    backend: str,
    rows: int,
    num_pages: int,
    *,
    heads: int,
    kv_heads: int,
    page_size: int,
    pages_per_read: int | None = None,
) -> Capacity | TileCapacity:
    """Array sizes of what `plan` makes for a backend: room for every plan of at most `rows` rows.

    `pages_per_read` (the longest context in pages) may bound them further.
    """
    tiling = _backend(backend).tiling
    if tiling is not None:
        cut = tiling(heads, kv_heads, page_size)
        return TileCapacity.for_bucket(rows, num_pages, cut, pages_per_read)
    return Capacity.for_bucket(rows, num_pages, pages_per_read)


def plan(
    reads: Reads, capacity: Capacity | TileCapacity, page_size: int
) -> tuple[Int[np.ndarray, " reads"], WorkList | TileList]:
    """Lay rows out in tree order and list their work: see `plan_rows` and `plan_tiles`."""
    if isinstance(capacity, TileCapacity):
        return plan_tiles(reads, capacity)
    return plan_rows(reads, capacity, page_size)


def _backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"no attention backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]


@overload
def shared_prefix_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    work: WorkList | TileList,
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
    work: WorkList | TileList,
    *,
    scale: float,
    backend: str,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...
def shared_prefix_attention(
    q: Float[Array, "rows heads head_dim"],
    k_pages: Float[Array, "pages kv_heads page_size head_dim"],
    v_pages: Float[Array, "pages kv_heads page_size head_dim"],
    work: WorkList | TileList,
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
    attend = _backend(backend).attend
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k_pages.shape[1]} KV heads evenly")
    out, lse = attend(q, k_pages, v_pages, work, scale=scale)
    return (out, lse) if return_lse else out


def enter(
    qkv: Float[Array, "rows all_heads head_dim"],
    norms: HeadNorms | None,
    angles: tuple[Float[Array, "rows pairs"], Float[Array, "rows pairs"]],
    k_pages: Float[Array, "pages kv_heads page_size head_dim"],
    v_pages: Float[Array, "pages kv_heads page_size head_dim"],
    places: Places,
    *,
    backend: str,
) -> tuple[Array, Array, Array]:
    """What comes before attention: queries and keys normalised and rotated, keys and values written.

    `qkv` are the heads of each row: queries, then keys, then values. `angles` are (cos, sin) of each row's
    position. Returns the queries [rows, heads, head_dim] and the pages, which are updated in place where they
    are donated.
    """
    return _backend(backend).enter(qkv, norms, angles, k_pages, v_pages, places)
