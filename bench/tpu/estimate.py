"""How long a step should take on TPUs, from what is published of them and what their compiler says.

Nothing here is measured. A part takes as long as its bytes at the published rate of the memory, or as its
operations at the published peak, or as its kernel's static schedule at the clock, whichever is longest; the
parts follow each other. What is small beside them is left out: norms, activations, the greedy choice, and
what the host takes to start a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from attention.tpu_chips import Chip, update_cycles
from attention.tpu_plan import SUBLANES, TILE_WORDS, CoreTiles, Plan
from bench.hlo import Collective
from bench.tpu.cycles import AttentionCycles
from bench.tpu.figures import Figures

HOP = 1e-6  # seconds from one chip to its neighbour: assumed, not published


def products_seconds(nbytes: float, rows: int, chip: Chip, figures: Figures) -> float:
    """Of products of so many rows with so many bytes of bfloat16 weights."""
    return max(nbytes / chip.hbm, 2 * rows * (nbytes / 2) / figures.flops)


def collective_seconds(collective: Collective, sides: Sequence[int], figures: Figures) -> float:
    """Of one among chips in a grid of these sides.

    An all-reduce sends 2 (n - 1) / n of its bytes, half of them each way round a ring, as a chip in a grid
    has two neighbours at least; all others send (n - 1) / n of what each chip has in the end. A message
    passes along each side, and an all-reduce's result back.
    """
    count, hops = math.prod(sides), sum(side - 1 for side in sides)
    times = 2 if collective.kind == "all-reduce" else 1
    rate = figures.link * (2 if count > 2 else 1)
    sent = times * (count - 1) / count * collective.nbytes
    return sent / rate + times * hops * HOP


def collectives_seconds(collectives: Iterable[Collective], sides: Sequence[int], figures: Figures) -> float:
    return sum(collective_seconds(each, sides, figures) for each in collectives)


@dataclass(frozen=True, slots=True)
class Reading:
    """What attention of one layer does on the busiest core of a device, and what all of its cores read.

    cycles  static, of the busiest core
    pages   copied by all cores
    """

    cycles: float
    pages: int

    @classmethod
    def of(cls, tiles: CoreTiles, plan: Plan, cycles: AttentionCycles) -> Reading:
        words = np.asarray(tiles.tiles).reshape(-1, TILE_WORDS)
        bounds = np.asarray(tiles.cores)
        cores = [words[first:end] for first, end in pairwise(bounds)]
        busiest = max(cycles.once + sum(tile_cycles(tile, plan, cycles) for tile in core) for core in cores)
        used = words[: bounds[-1]]
        return cls(busiest, int(used[:, 3].sum() + used[:, 5].sum()))

    def seconds(self, page_bytes: int, chip: Chip, rows_bytes: int = 0) -> float:
        """Copies run beside the schedule, ahead of it: the longer of both counts.

        `rows_bytes` are those of queries and outputs, where these are copied, too.
        """
        return max(self.cycles / chip.clock, (self.pages * page_bytes + rows_bytes) / chip.hbm)


def tile_cycles(tile: np.ndarray, plan: Plan, cycles: AttentionCycles) -> float:
    """Of a tile's words: its rows are words 0 and 1; words 3 and 5 count its whole and its other pages."""
    row, rows, _, wholes, _, maskeds = map(int, tile)
    before = row * plan.group % SUBLANES
    lanes = before + rows * plan.group
    full, rest = divmod(wholes, plan.block_pages)
    masked = (rest > 0) + -(-maskeds // plan.block_pages)
    each = plan.kv_heads / cycles.heads
    return (
        cycles.tile
        + (wholes + maskeds) * cycles.page
        + (full + masked) * cycles.block
        + full * each * update_cycles(cycles.updates, lanes)
        + masked * (cycles.mask + each * update_cycles(cycles.masked, lanes))
    )


def roofline_shares(cycles: AttentionCycles, plan: Plan, page_bytes: int, chip: Chip) -> dict[int, float]:
    """What attention reaches of the memory's rate in full blocks that all rows see, by lanes."""
    reading = plan.block_pages * page_bytes * chip.cores / chip.hbm
    around = plan.block_pages * cycles.page + cycles.block
    each = plan.kv_heads / cycles.heads
    return {
        lanes: min(1.0, reading / ((around + each * update) / chip.clock))
        for lanes, update in cycles.updates.items()
    }


def sides_of(coordinates: Iterable[Sequence[int]]) -> list[int]:
    """Of the grid that chips at these places fill."""
    return [len(set(each)) for each in zip(*coordinates, strict=True)]
