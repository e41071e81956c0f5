"""Schedule invariance: one request through the same step program alone, with others, and in other chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.checks.logits import Pages, Segment, Served, random_request


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the observed request is served.

    mates     other requests' rows in every step, as many as fit
    last      its pages have the highest ids, so that its rows come after the others'
    chunk     most rows of its trunk in a step
    width     branches that advance in a step; all unless set
    sharing   a branch of another request reads the same trunk in every step
    """

    mates: bool = False
    last: bool = False
    chunk: int | None = None
    width: int | None = None
    sharing: bool = False


SCHEDULES = {
    "alone, once more": Schedule(),
    "with others": Schedule(mates=True),
    "after others": Schedule(mates=True, last=True),
    "in small chunks": Schedule(chunk=7),
    "one branch at a time": Schedule(width=1),
    "its trunk shared": Schedule(sharing=True),
}


def serve_once(served: Served, schedule: Schedule, seed: int) -> np.ndarray:
    """Logits [tokens, vocab] of a request's trunk and branches, which depend on the seed only if at all."""
    scale, pages = served.scale, Pages(served.num_pages)
    rng, others = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    trunk, *branches = random_request(scale, rng, pages, last=schedule.last)
    guest = pages.segment(others.integers(0, scale.logits.vocab_size, scale.tail), trunk)
    mates = [s for _ in range(scale.requests - 1) for s in random_request(scale, others, pages)]
    width, chunk = schedule.width or scale.width, schedule.chunk or scale.rows // 2

    def feed(*parts: tuple[Segment, int]) -> None:
        room = scale.rows - sum(count for _, count in parts)
        step = list(parts)
        if schedule.sharing and guest.left and not trunk.left:
            step.append((guest, 1))
        ready = [s for s in mates if s.left and not (s.parent and s.parent.left)] if schedule.mates else []
        for segment in ready:
            count = min(int(others.choice([1, 3, 10])), segment.left, room)
            if count:
                step.append((segment, count))
                room -= count
        served.feed(*step)

    while trunk.left:
        feed((trunk, min(chunk, trunk.left)))
    for first in range(0, len(branches), width):
        for _ in range(scale.tail):
            feed(*((branch, 1) for branch in branches[first : first + width]))
    return np.concatenate([part for segment in (trunk, *branches) for part in segment.logits])


def check_schedules(served: Served, seed: int) -> list[dict[str, Any]]:
    alone = serve_once(served, Schedule(), seed)
    rows = []
    for name, schedule in SCHEDULES.items():
        logits = serve_once(served, schedule, seed)
        rows.append(
            {
                "schedule": name,
                "bit_equal_rows": float((logits == alone).all(-1).mean()),
                "largest_difference": float(np.abs(logits - alone).max()),
                "same_top_token": float((logits.argmax(-1) == alone.argmax(-1)).mean()),
            }
        )
    return rows
