"""What the attention kernel of a TPU is compiled for, and what a step's work is to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from attention.tpu_chips import MIB
from attention.tpu_pages import LANES, planes

if TYPE_CHECKING:
    from jaxtyping import Int32

NARROW = 128  # lanes that are computed at once; wider tiles are so many times as long
WIDE = 512  # most lanes of a tile
BUFFERS = 3  # blocks of pages in fast memory
SUBLANES = 8
SPARE = 2 * MIB  # of a core's vector memory, for what Mosaic itself keeps there
TILE_WORDS = 6
CHUNK = 256  # references that lie together; a block has fewer, which two chunks hold wherever they begin


class CoreTiles(NamedTuple):
    """A step's tiles, core by core, longest first: int32 arrays, NumPy or JAX; a pytree.

    tiles  of each TILE_WORDS words: its first row, how many; the first reference of the pages that all its
           rows see whole, how many; that of its other pages, how many
    cores  where the tiles of each core begin, and where the last core's end
    refs   CHUNK pages, then who sees what of each of these (`attention.tiles.pack_sees`), all rows all of
           those that are seen whole; and so on
    """

    tiles: Int32[Any, " words"]
    cores: Int32[Any, " cores_and_one"]
    refs: Int32[Any, "chunks 2 256"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes that a kernel is compiled for.

    lanes  most lanes of a tile
    """

    rows: int
    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    block_pages: int
    lanes: int
    cores: int
    itemsize: int

    @property
    def block_tokens(self) -> int:
        return self.block_pages * self.page_size

    @property
    def slack(self) -> int:
        """Lanes in front of a tile's first row, as windows of lanes begin at multiples of SUBLANES."""
        return SUBLANES - 1 if self.group % SUBLANES else 0

    @property
    def variants(self) -> tuple[int, ...]:
        """Numbers of lanes that the kernel has code for, the largest in a loop."""
        most = _up(self.lanes + self.slack, SUBLANES)
        sizes = sorted({_up(self.group + self.slack, SUBLANES), 64, NARROW})
        enough = next((i for i, size in enumerate(sizes) if size >= most), len(sizes) - 1)
        return tuple(sizes[: enough + 1])

    @property
    def window(self) -> int:
        """Lanes of the running softmax."""
        return _up(self.lanes + self.slack, self.variants[-1])

    @property
    def all_lanes(self) -> int:
        """Of all rows, with room behind them for a window that begins at the last."""
        return _up(self.rows * self.group, SUBLANES) + self.window

    def vmem(self) -> dict[str, int]:
        """Bytes of a core's vector memory, by what they are for."""
        page = self.kv_heads * planes(self.head_dim) * self.page_size * LANES * self.itemsize
        lane = self.kv_heads * LANES * 4
        chunk = self.variants[-1] * self.block_tokens
        return {
            "pages": BUFFERS * self.block_pages * page,
            "queries and results": 3 * self.all_lanes * lane,
            "running softmax": 3 * self.window * lane,
            "scores": chunk * (4 + 4 + self.itemsize) + 2 * SUBLANES * self.block_tokens * 4,
        }

    def smem(self, tiles: int) -> dict[str, int]:
        """Bytes of a core's scalar memory, by what they are for."""
        return {"tiles": 4 * TILE_WORDS * tiles, "references": 4 * 4 * CHUNK * (BUFFERS + 1)}


def _up(n: int, size: int) -> int:
    """The next multiple of `size`."""
    return -(-n // size) * size
