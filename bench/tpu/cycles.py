"""What the project's kernels take, by their static schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.tpu.schedule import Schedule, ScheduleError

ATTEND, WRITE = "shared_prefix_attention", "kv_write"
# Numbers of a vector register; of each number of a matrix product's result, one power of two.
_LANES, _SUBLANES = 128, 8


@dataclass(frozen=True, slots=True)
class AttentionCycles:
    """Cycles of the attention kernel.

    heads     KV heads of one update
    updates   of adding a block of tokens to the running softmax, by the number of lanes
    masked    the same where not all rows see all of the tokens
    page      of starting to copy one page; nothing else is issued meanwhile
    mask      of laying out who sees which token of a block
    block     of what else the loop over blocks does
    tile      of what else the loop over tiles does
    once      of what else there is
    """

    heads: int
    updates: dict[int, int]
    masked: dict[int, int]
    page: float
    mask: int
    block: int
    tile: int
    once: int

    @classmethod
    def of(cls, schedule: Schedule, variants: Sequence[int], block_tokens: int) -> AttentionCycles:
        """`variants` are the numbers of lanes that there is code for. Raises ScheduleError."""
        updates, copies = schedule.innermost("vmatmul"), schedule.innermost("dma.hbm_to_vmem")
        if len(updates) != 2 * len(variants) or not copies:
            raise ScheduleError(
                f"{len(updates)} regions with matrix products, not two for each of {variants} lanes"
            )
        powers = [schedule.count("vpow2", update) for update in updates]
        lanes = [_SUBLANES * count / (block_tokens / _LANES + 1) for count in powers]
        heads = lanes[0] / variants[0]
        if heads not in (1, 2, 4, 8) or lanes != [heads * each for each in (*variants, *variants)]:
            raise ScheduleError(f"updates of {lanes} lanes and heads, not of {variants} lanes")
        cycles = [update.cycles for update in updates]
        blocks = schedule.around(updates)
        tiles = schedule.around([blocks])
        most = max(schedule.count("dma.hbm_to_vmem", copy) for copy in copies)
        unrolled = [copy for copy in copies if schedule.count("dma.hbm_to_vmem", copy) == most]
        masks = [loop for loop in schedule.loops if blocks.holds(loop) and (schedule.times(loop) or 0) > 1]
        masks = [loop for loop in masks if not any(loop.holds(update) for update in updates)]
        apart = sum(each.cycles for each in (*updates, *masks, *filter(blocks.holds, copies)))
        return cls(
            heads=int(heads),
            updates=dict(zip(variants, cycles[: len(variants)], strict=True)),
            masked=dict(zip(variants, cycles[len(variants) :], strict=True)),
            page=max(copy.cycles for copy in unrolled) / most,
            mask=sum((schedule.times(loop) or 1) * schedule.cycles(loop) for loop in masks),
            block=blocks.cycles - apart,
            tile=tiles.cycles - blocks.cycles,
            once=len(schedule.bundles) - tiles.cycles,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class WriteCycles:
    """Cycles of the kernel that writes KV, for all rows of a bucket."""

    once: int

    @classmethod
    def of(cls, schedule: Schedule) -> WriteCycles:
        """Raises ScheduleError if it is not known how often its loops run."""
        if None in map(schedule.times, schedule.loops):
            raise ScheduleError("a loop of the kernel that writes runs for nobody knows how long")
        return cls(schedule.cycles(schedule.whole))
