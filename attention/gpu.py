"""Gpu: attention for NVIDIA GPUs, over the tiles of `attention.tiles`.

What its kernels are and what makes them fast is in `attention.gpu_tiles`; the numbers here were measured on
an H200, whose sizes and costs the planner goes by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from attention.backend import Backend, Sizes
from attention.gpu_tiles import NARROW, WIDE, attend
from attention.gpu_write import write
from attention.heads import group_size
from attention.layout import padded
from attention.tile_planner import lay_out_tiles
from attention.tiles import Costs, TileCapacity, TileList, Tiling, refilled

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from jax import Array
    from jaxtyping import Int, Int32

    from attention.reads import Reads

BLOCK_TOKENS = 64
MULTIPROCESSORS = 132  # of an H100 or H200, each with room for two workers' shared memory, or a tall tile's
WORKERS = 2 * MULTIPROCESSORS
TALL_LANES = 128
TALL_STEP = 384  # rows from which steps hold prompts rather than branches: the launch takes 3 µs, used or not
TALL_PAGES = (16, 32, 64, 128)
# With head_dim 128 in bfloat16 the workers of an H200 stream 4.06 TB/s together through narrow tiles, and
# 3.6 through wide ones; partial results, float32, move at 4. `alone` is an estimate.
H200 = Costs(
    narrow_token=512 * WORKERS / 4.06e12,
    wide_token=512 * WORKERS / 3.6e12,
    tile=1.5e-6,
    partial=128 * 8 * WORKERS / 4e12,
    alone=0.4,
    tall_token=1.5e-8,
)


@dataclass(frozen=True, slots=True)
class Gpu(Backend):
    """alone      every read has a tile of its own, so that a row's result does not depend on the other rows
    interpret  the kernels run without a GPU, slowly
    tall_step  rows of the smallest bucket with tall tiles, for prompts (`attention.gpu_tall`); 0: none has
    """

    alone: bool = False
    interpret: bool = False
    tall_step: int = 0

    @property
    def name(self) -> str:
        return "gpu" + "-alone" * self.alone + "-interpreted" * self.interpret

    def supports(self, head_dim: int, dtype: Any) -> bool:
        return head_dim >= 16 and head_dim & (head_dim - 1) == 0 and jnp.dtype(dtype).itemsize <= 4

    @property
    def triton(self) -> Literal["compiled", "interpreted"]:
        return "interpreted" if self.interpret else "compiled"

    def deterministic(self) -> Gpu:
        return replace(self, alone=True, tall_step=0)

    def fitted(self, head_dim: int, dtype: Any, devices: int) -> Gpu:
        hopper = jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"
        takes = head_dim == 128 and jnp.dtype(dtype) == jnp.bfloat16 and devices == 1
        compiled = not (self.alone or self.interpret)
        return replace(self, tall_step=TALL_STEP) if hopper and takes and compiled else self

    def tiling(self, heads: int, kv_heads: int, page_size: int, rows: int = 0) -> Tiling:
        """How the kernels cut a step of a bucket of so many rows into tiles."""
        group = group_size(heads, kv_heads)
        tall = 0 < self.tall_step <= rows and page_size in TALL_PAGES and group <= NARROW
        return Tiling(
            page_size=page_size,
            kv_heads=kv_heads,
            narrow_rows=max(1, NARROW // group),
            wide_rows=max(1, WIDE // group),
            block_pages=max(1, BLOCK_TOKENS // page_size),
            workers=WORKERS,
            costs=H200,
            alone=self.alone,
            tall_rows=TALL_LANES // group if tall else 0,
            tall_workers=MULTIPROCESSORS if tall else 0,
        )

    def capacity(self, rows: int, sizes: Sizes, pages_per_read: int | None = None) -> TileCapacity:
        tiling = self.tiling(sizes.heads, sizes.kv_heads, sizes.page_size, rows)
        return TileCapacity.for_bucket(rows, sizes.num_pages, tiling, pages_per_read, paths=sizes.paths)

    def lay_out(self, reads: Reads, capacity: Any) -> tuple[Int[np.ndarray, " reads"], TileList]:
        order, tiles = lay_out_tiles(reads, capacity)
        return order, padded(tiles, capacity.empty())

    def lay_out_unpadded(self, reads: Reads, capacity: Any) -> tuple[Int[np.ndarray, " reads"], TileList]:
        return lay_out_tiles(reads, capacity)

    def write(self, qkv: Array, norms: Any, angles: Any, pages: Any, places: Any) -> tuple[Array, Any]:
        return write(qkv, norms, angles, pages, places, interpret=self.interpret)

    def attend(
        self, q: Array, pages: Sequence[Array], work: TileList, *, scale: float
    ) -> tuple[Array, Array]:
        """As any backend; and raises ValueError if page_size is not a power of two from 2 on, or the pages
        have more elements than the kernels' 32-bit offsets reach."""
        rows, heads, head_dim = q.shape
        _, kv_heads, page_size, _ = pages[0].shape
        if not self.supports(head_dim, q.dtype):
            raise ValueError(
                f"the GPU kernels need a head_dim that is a power of two, 16 or more, and up to 32 bits: not "
                f"{head_dim}, {q.dtype}"
            )
        if page_size < 2 or page_size & (page_size - 1):
            raise ValueError(f"the GPU kernels need a page_size that is a power of two, not {page_size}")
        if pages[0].size > 2**31:
            raise ValueError(
                f"the GPU kernels reach 2**31 elements of keys, not {pages[0].size} {pages[0].shape}"
            )
        tiling = self.tiling(heads, kv_heads, page_size, rows)
        return attend(q, pages, work, tiling, scale=scale, interpret=self.interpret)

    def refill(self, work: TileList, filled: Int32[Array, " pages"]) -> TileList:
        valid = filled[work.page_ids]
        sees = jnp.where(valid < 0, work.page_sees, refilled(work.page_sees, valid))
        return work._replace(page_sees=sees)
