"""Tpu: attention for TPUs, over the tiles of `attention.tiles`.

What its kernels are and what makes them fast is in `attention.tpu_tiles`; how pages lie, in
`attention.tpu_pages`; what the planner goes by is data of the chip, in `attention.tpu_chips`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from attention.backend import Backend, PageArray, Sizes
from attention.heads import group_size
from attention.layout import padded
from attention.tile_planner import lay_out_tiles
from attention.tiles import MAX_ROWS, Costs, TileCapacity, TileList, Tiling, pack_sees, refilled
from attention.tpu_chips import CHIPS, MIB, Chip
from attention.tpu_pages import LANES, joined, planes
from attention.tpu_plan import BUFFERS, CHUNK, NARROW, SPARE, TILE_WORDS, WIDE, CoreTiles, Plan
from attention.tpu_tiles import attend
from attention.tpu_write import write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax import Array
    from jaxtyping import Int, Int32

    from attention.reads import Reads

TOKEN_BYTES = 2 * LANES * 2  # of one KV head's key and value, bfloat16
TILE_CYCLES = 400  # of a tile besides its blocks
SMALLEST_PAGE = 16
PAGES_SHARE = 1 / 2  # of a core's vector memory, for pages on their way


@dataclass(frozen=True, slots=True)
class CoreCapacity:
    """Array sizes of the work of one row bucket."""

    tiles: TileCapacity
    cores: int
    chunks: int
    num_pages: int

    @property
    def rows(self) -> int:
        return self.tiles.rows

    def empty(self) -> CoreTiles:
        return CoreTiles(
            tiles=np.zeros(TILE_WORDS * self.tiles.tiles, np.int32),
            cores=np.zeros(self.cores + 1, np.int32),
            refs=np.zeros((self.chunks, 2, CHUNK), np.int32),
        )


@dataclass(frozen=True, slots=True)
class Tpu(Backend):
    """chip          the kind of device
    interpret     the kernels run without a TPU, slowly: True, or how (pltpu.InterpretParams)
    block_tokens  most tokens of a block
    """

    chip: Chip = CHIPS["v5e"]
    interpret: Any = False
    block_tokens: int = 2048

    @property
    def name(self) -> str:
        return f"tpu-{self.chip.name}" + "-interpreted" * bool(self.interpret)

    def supports(self, head_dim: int, dtype: Any) -> bool:
        return head_dim <= LANES and head_dim % 2 == 0 and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)

    def pages(self, sizes: Sizes, head_dim: int, dtype: Any) -> Sequence[PageArray]:
        shape = (sizes.num_pages, sizes.kv_heads, planes(head_dim), sizes.page_size, LANES)
        return (PageArray(shape, ("pages", "kv_heads", None, "page", None), dtype),)

    def stored(self, k: Array, v: Array) -> tuple[Array]:
        return (joined(k, v).swapaxes(2, 3),)

    def tiling(self, heads: int, kv_heads: int, page_size: int) -> Tiling:
        """How the kernel cuts a step into tiles, each of which a core computes with all of its KV heads."""
        group = group_size(heads, kv_heads)
        narrow, wide = (kv_heads * self.chip.token_seconds(lanes, TOKEN_BYTES) for lanes in (NARROW, WIDE))
        return Tiling(
            page_size=page_size,
            kv_heads=1,
            narrow_rows=max(1, NARROW // group),
            wide_rows=max(1, min(MAX_ROWS, WIDE // group)),
            block_pages=self._block_tokens(kv_heads) // page_size,
            workers=self.chip.cores,
            costs=Costs(
                narrow_token=narrow,
                wide_token=wide,
                tile=TILE_CYCLES / self.chip.clock,
                partial=0.0,  # there are none
                alone=1.0,
            ),
            splits=False,
        )

    def plan(self, rows: int, sizes: Sizes, head_dim: int, dtype: Any) -> Plan:
        """What the attention kernel of a bucket is compiled for."""
        group = group_size(sizes.heads, sizes.kv_heads)
        tiling = self.tiling(sizes.heads, sizes.kv_heads, sizes.page_size)
        return Plan(
            rows=rows,
            kv_heads=sizes.kv_heads,
            group=group,
            head_dim=head_dim,
            page_size=sizes.page_size,
            block_pages=tiling.block_pages,
            lanes=group * min(rows, tiling.wide_rows),
            cores=self.chip.cores,
            itemsize=jnp.dtype(dtype).itemsize,
        )

    def _block_tokens(self, kv_heads: int) -> int:
        """Tokens of a block: as many as fit, float32, with all heads."""
        room = PAGES_SHARE * (self.chip.vmem - SPARE) / BUFFERS / (kv_heads * 2 * LANES * 4)
        return min(self.block_tokens, max(LANES, 2 ** int(np.log2(room))))

    def capacity(self, rows: int, sizes: Sizes, pages_per_read: int | None = None) -> CoreCapacity:
        """As any backend; and raises ValueError if page_size is not a power of two in 16..128."""
        size = sizes.page_size
        if size & size - 1 or not SMALLEST_PAGE <= size <= LANES:
            raise ValueError(f"the TPU kernels need a page_size of 16, 32, 64 or 128, not {size}")
        tiling = self.tiling(sizes.heads, sizes.kv_heads, size)
        tiles = TileCapacity.for_bucket(rows, sizes.num_pages, tiling, pages_per_read, paths=sizes.paths)
        # Whoever reads references takes a chunk and the one after it.
        chunks = -(-tiles.page_refs // CHUNK) + 1
        return CoreCapacity(tiles, self.chip.cores, chunks, sizes.num_pages)

    def lay_out(self, reads: Reads, capacity: Any) -> tuple[Int[np.ndarray, " reads"], CoreTiles]:
        order, tiles = lay_out_tiles(reads, capacity.tiles)
        tiles = padded(tiles, capacity.tiles.empty())
        if not 0 <= tiles.page_ids.min() <= tiles.page_ids.max() < capacity.num_pages:
            raise ValueError(f"a page is read that is not among the pool's {capacity.num_pages}")
        return order, _by_core(tiles, capacity)

    def write(self, qkv: Array, norms: Any, angles: Any, pages: Any, places: Any) -> tuple[Array, Any]:
        return write(qkv, norms, angles, pages, places, interpret=self._interpreter)

    def attend(
        self, q: Array, pages: Sequence[Array], work: CoreTiles, *, scale: float
    ) -> tuple[Array, Array]:
        """As any backend; and raises ValueError if the kernel needs more memory than a core has."""
        rows, heads, head_dim = q.shape
        (array,) = pages
        num_pages, kv_heads, _, page_size, _ = array.shape
        if not self.supports(head_dim, array.dtype):
            raise ValueError(
                f"the TPU kernels need an even head_dim of at most {LANES}, of bfloat16 or float32: not "
                f"{head_dim}, {array.dtype}"
            )
        sizes = Sizes(num_pages=num_pages, page_size=page_size, heads=heads, kv_heads=kv_heads)
        plan = self.plan(rows, sizes, head_dim, array.dtype)
        limit = self._vmem_limit(plan)
        self._check("scalar", plan.smem(work.tiles.size // TILE_WORDS), self.chip.smem)
        return attend(q, array, work, plan, scale=scale, vmem_limit=limit, interpret=self._interpreter)

    def refill(self, work: CoreTiles, filled: Int32[Array, " pages"]) -> CoreTiles:
        ids, sees = work.refs[:, 0], work.refs[:, 1]
        valid = filled[ids]
        sees = jnp.where(valid < 0, sees, refilled(sees, valid))
        return work._replace(refs=jnp.stack([ids, sees], axis=1))

    @property
    def _interpreter(self) -> Any:
        return pltpu.InterpretParams() if self.interpret is True else self.interpret

    def _vmem_limit(self, plan: Plan) -> int:
        """Bytes of vector memory that the kernel may take; raises ValueError if a core has less."""
        parts = plan.vmem()
        self._check("vector", parts, self.chip.vmem - SPARE)
        return sum(parts.values()) + SPARE

    def _check(self, memory: str, parts: dict[str, int], there: int) -> None:
        if sum(parts.values()) <= there:
            return
        needs = ", ".join(f"{name} {size / MIB:.2f}" for name, size in parts.items())
        raise ValueError(
            f"attention needs more {memory} memory than a core of {self.chip.name} has: {needs} MiB, of "
            f"{there / MIB:.2f}; smaller buckets need less"
        )


def _by_core(tiles: TileList, capacity: CoreCapacity) -> CoreTiles:
    """The same tiles shared out among the cores: the longest first, each to the core that has least."""
    out, count, tiling = capacity.empty(), int(tiles.num_tiles), capacity.tiles.tiling
    words = np.hstack([tiles.tile_rows, tiles.tile_whole, tiles.tile_masked])[:count]
    load, core_of = np.zeros(capacity.cores), np.zeros(count, np.int64)
    if capacity.cores > 1:
        blocks = -(-words[:, 3] // tiling.block_pages) - (-words[:, 5] // tiling.block_pages)
        for tile, each in enumerate(tiling.tile_seconds(words[:, 1], blocks)):
            core_of[tile] = core = load.argmin()
            load[core] += each
    out.cores[1:] = np.bincount(core_of, minlength=capacity.cores).cumsum()
    out.tiles[: words.size] = words[np.argsort(core_of, kind="stable")].ravel()
    whole = pack_sees(tiling.page_size, 0, np.array([MAX_ROWS]))
    sees = np.where(tiles.page_sees == 0, whole, tiles.page_sees)  # it is of masked references only
    for ours, theirs in ((out.refs[:, 0], tiles.page_ids), (out.refs[:, 1], sees)):
        flat = np.zeros(ours.size, np.int32)
        flat[: len(theirs)] = theirs
        ours[...] = flat.reshape(ours.shape)
    return out
