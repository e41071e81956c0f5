"""What the kernels read: a step's work as tiles, made by `attention.tile_planner`.

A tile is a run of rows in tree order and the pages that they read, with one KV head's keys and values of each
page read once for all of the tile's rows. What all rows see whole comes first, the rest (tails, nested
prefixes, a prompt chunk's diagonal) after it, masked. A whole group of branches is one tile without partial
results, unless it is split so that all of the device has work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Int32

MAX_PAGE_SIZE = MAX_ROWS = 128  # what page_sees has bits for
NO_LIMIT = 255  # page_sees: every offset is seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds that a device's worker needs while all are busy. Only their ratios matter.

    narrow_token  a key and a value, for the rows of a narrow tile
    wide_token    the same, for those of a wide tile
    tile          what a tile costs besides
    partial       one query head's partial result of a row, written and merged
    alone         what a token takes a worker while most others idle, relative to the above
    """

    narrow_token: float
    wide_token: float
    tile: float
    partial: float
    alone: float
    tall_token: float = 0.0


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a device's kernel cuts a step into tiles. Static: known to the kernel and to the planner.

    page_size    positions of a page
    kv_heads     KV heads; each tile is computed once for each
    narrow_rows  most rows of a narrow tile
    wide_rows    most rows of a wide tile
    block_pages  page references that the kernel reads at once
    workers      (tile, KV head) pairs that the device computes at the same time
    costs        what the device takes for them
    alone        each read has a tile of its own, whose pages come in order and unsplit: what a row computes
                 does not depend on the other rows
    splits       a tile may be split among workers, whose partial results are then merged
    tall_rows    most rows of a tall tile, which has rows of one read alone and workers of its own; 0: none
    tall_workers (tile, KV head) pairs of tall tiles that the device computes at the same time
    """

    page_size: int
    kv_heads: int
    narrow_rows: int
    wide_rows: int
    block_pages: int
    workers: int
    costs: Costs
    alone: bool = False
    splits: bool = True
    tall_rows: int = 0
    tall_workers: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page_size must be in 1..{MAX_PAGE_SIZE}, not {self.page_size}")
        if not 1 <= self.narrow_rows <= self.wide_rows <= MAX_ROWS:
            raise ValueError(f"a Tiling needs 1 <= narrow_rows <= wide_rows <= {MAX_ROWS}")
        if min(self.kv_heads, self.block_pages, self.workers) < 1:
            raise ValueError("a Tiling needs kv_heads, block_pages and workers >= 1")
        if self.alone and self.block_pages > 1:
            raise ValueError("tiles of reads alone need blocks of one page: a larger page_size")
        if self.tall_rows and not (self.wide_rows < self.tall_rows <= MAX_ROWS and self.tall_workers >= 1):
            raise ValueError(f"tall tiles need wide_rows < tall_rows <= {MAX_ROWS}, and tall_workers >= 1")

    @property
    def head_workers(self) -> int:
        """How many tiles the device computes at the same time, with all of their heads."""
        return max(1, self.workers // self.kv_heads)

    @property
    def tall_head_workers(self) -> int:
        """How many tall tiles the device computes at the same time, with all of their heads."""
        return max(1, self.tall_workers // self.kv_heads)

    @property
    def most_rows(self) -> int:
        """Of a read in one tile."""
        return self.tall_rows or self.wide_rows

    @property
    def most_tall_parts(self) -> int:
        """Parts that the tall tiles of a step may be split into."""
        return 3 * self.tall_head_workers if self.tall_rows else 0

    def block_seconds(self, rows: Int[np.ndarray, " tiles"]) -> np.ndarray:
        """What a tile of so many rows takes a worker for a block, of one head."""
        token = np.where(rows > self.narrow_rows, self.costs.wide_token, self.costs.narrow_token)
        if self.tall_rows:
            token = np.where(rows > self.wide_rows, self.costs.tall_token, token)
        return self.block_pages * self.page_size * token

    def tile_seconds(
        self, rows: Int[np.ndarray, " tiles"], blocks: Int[np.ndarray, " tiles"]
    ) -> Float[np.ndarray, " tiles"]:
        """What tiles of so many rows and blocks take a worker, of one head."""
        return self.costs.tile + blocks * self.block_seconds(rows)

    @property
    def partial_row_seconds(self) -> float:
        """Of a row's partial result: of its query heads per KV head, 16 of which fill a narrow tile."""
        return self.costs.partial * max(1, 16 // self.narrow_rows)


@dataclass(frozen=True, slots=True)
class TileCapacity:
    """Array sizes of the tile lists of one row bucket."""

    rows: int
    tiles: int
    page_refs: int
    slots: int
    tiling: Tiling

    @classmethod
    def for_bucket(
        cls,
        rows: int,
        num_pages: int,
        tiling: Tiling,
        pages_per_read: int | None = None,
        *,
        paths: int = 1,
    ) -> TileCapacity:
        """Room for every step of at most `rows` rows.

        Splitting makes one tile more per cut, and there are fewer cuts than `tiling.head_workers`, besides
        those of tall tiles, all of whose parts may have partial results. A pool
        page is referred to once for each of the `paths` on which reads come to it (see `Sizes`), once more by
        each read that sees only a part of it, and once more where a run of rows that shares it is cut: two
        neighbours of such a run have more than `wide_rows` rows. `pages_per_read` (the longest context in
        pages) bounds that. Each tile may mask pages that others have as whole ones, to fill a block.
        """
        longest = num_pages if pages_per_read is None else min(num_pages, pages_per_read)
        cuts = min(rows - 1, rows if tiling.alone else 2 * rows // (tiling.wide_rows + 1))
        return cls(
            rows=rows,
            tiles=rows + tiling.head_workers + tiling.most_tall_parts,
            page_refs=min(paths * num_pages + rows + cuts * longest, rows * longest)
            + rows * (tiling.block_pages - 1),
            slots=rows
            + tiling.head_workers * min(rows, tiling.wide_rows)
            + tiling.most_tall_parts * min(rows, tiling.tall_rows),
            tiling=tiling,
        )

    def empty(self) -> TileList:
        return TileList(
            tile_rows=np.zeros((self.tiles, 2), np.int32),
            tile_whole=np.zeros((self.tiles, 2), np.int32),
            tile_masked=np.zeros((self.tiles, 2), np.int32),
            tile_part=np.full(self.tiles, -1, np.int32),
            page_ids=np.zeros(self.page_refs, np.int32),
            page_sees=np.zeros(self.page_refs, np.int32),
            row_parts=np.zeros((self.rows, 2), np.int32),
            part_slots=np.zeros(self.slots, np.int32),
            num_tiles=np.zeros((), np.int32),
        )


class TileList(NamedTuple):
    """The tiles of a step, tall ones first, then longest first: int32 arrays, NumPy or JAX; a pytree.

    Entries past the counts are padding. A tile has at least one row and at least one page.

    tile_rows    first row, row count
    tile_whole   first page reference, count: full pages that every row of the tile sees whole
    tile_masked  first page reference, count: its other pages
    tile_part    -1: what the tile computes is final; else where part_slots has the slot of its first row's
                 partial result, which the other rows' follow
    page_ids     page of each reference; tiles may share references
    page_sees    who sees what of it, packed (`pack_sees`); of masked references only
    row_parts    first slot, count: the row's partial results; a count of -1 where a tile is final
    part_slots   slots of the partial results, tile by tile
    """

    tile_rows: Int32[Any, "tiles 2"]
    tile_whole: Int32[Any, "tiles 2"]
    tile_masked: Int32[Any, "tiles 2"]
    tile_part: Int32[Any, " tiles"]
    page_ids: Int32[Any, " page_refs"]
    page_sees: Int32[Any, " page_refs"]
    row_parts: Int32[Any, "rows 2"]
    part_slots: Int32[Any, " slots"]
    num_tiles: Int32[Any, ""]


def pack_sees(
    valid: Int[np.ndarray, " refs"] | int,
    first: Int[np.ndarray, " refs"] | int,
    end: Int[np.ndarray, " refs"],
    causal: Int[np.ndarray, " refs"] | int = NO_LIMIT,
) -> Int32[np.ndarray, " refs"]:
    """Row i of a tile (i = 0 is its first) sees offset o of a page if o < valid, first <= i < end and
    o <= causal + i.

    Bits 0-7 valid (1..128), 8-14 first (0..127), 15-22 end (1..128), 23-31 causal + 256 (causal in
    -256..255). As no offset exceeds 127, a causal of 255 is no limit.
    """
    return ((end << 15) + ((causal + 256 << 23) + (first << 8) + valid)).astype(np.uint32).view(np.int32)


def unpack_sees(word: Int32[Any, "*shape"]) -> tuple[Any, Any, Any, Any]:
    """(valid, first, end, causal) of packed words, NumPy or JAX."""
    return word & 0xFF, word >> 8 & 0x7F, word >> 15 & 0xFF, (word >> 23 & 0x1FF) - 256


def refilled(word: Int32[Any, "*shape"], valid: Int32[Any, "*shape"]) -> Int32[Any, "*shape"]:
    """The words of the same pages with `valid` positions filled; of an empty page nobody sees anything."""
    end = word & (0xFF << 15)
    others = word & ~(0xFF | 0xFF << 15)
    return others | end * (valid > 0) | (valid + (valid == 0))
