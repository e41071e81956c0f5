"""Cuts what a step's query rows read into tiles: reads in, `TileList` out. NumPy only.

Where the rows are cut (`attention.tile_cuts`), and which tiles are split so that all of the device has work
(`attention.tile_parts`), is decided by predicted cost; `attention.tile_reads` lists what each tile reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attention.layout import check_fits
from attention.reads import Reads, ReadTree
from attention.tile_cuts import cut, cut_least
from attention.tile_parts import Parts, split_tiles
from attention.tile_reads import Tiles
from attention.tiles import TileCapacity, TileList

if TYPE_CHECKING:
    from jaxtyping import Int


def lay_out_tiles(reads: Reads, capacity: TileCapacity) -> tuple[Int[np.ndarray, " reads"], TileList]:
    """`attention.backend.Backend.lay_out_unpadded`: rows in tree order, cut into tiles.

    Raises ValueError if they exceed `capacity` however coarsely the tiles are split.
    """
    tiling = capacity.tiling
    if not reads.own:
        return np.zeros(0, np.int64), capacity.empty()
    order, tree = ReadTree.of(reads, tiling.page_size)
    tree = tree.split(tiling.most_rows)
    check_fits("rows", int(tree.rows.sum()), capacity.rows)

    if tiling.alone:
        tiles = Tiles.of(tree, np.arange(len(tree.rows)), tiling)
        _check_fits(tiles, capacity)
        return order, Parts.unsplit(tiles, tiling).listed(tiles, tiling)
    tiles = Tiles.of(tree, cut(tree, tiling), tiling)
    if len(tiles.page_ids) > capacity.page_refs:
        tiles = Tiles.of(tree, cut_least(tree, tiling), tiling)
    _check_fits(tiles, capacity)
    parts = split_tiles(tiles, capacity) if tiling.splits else Parts.unsplit(tiles, tiling)
    return order, parts.listed(tiles, tiling)


def _check_fits(tiles: Tiles, capacity: TileCapacity) -> None:
    check_fits("tiles", len(tiles.row), capacity.tiles)
    check_fits("page references", len(tiles.page_ids), capacity.page_refs)
