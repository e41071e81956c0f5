"""Sequence: one hand-laid segment of KV pages, and the step inputs that feed it. A scheduler for tests."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field

import numpy as np

from attention import PageRun, Read, Reads
from model.sampling import SampleInputs
from model.step import StepInputs, StepLayout


@dataclass
class Sequence:
    """Positions in `pages`, filled in order; `ancestors` are the sequences that it continues."""

    pages: list[int]
    page_size: int
    slot: int = 0
    ancestors: tuple[Sequence, ...] = ()
    start: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def segment(self) -> PageRun:
        """The pages in use."""
        return PageRun(self.pages[: -(-self.length // self.page_size)], self.length)

    def feed(self, tokens: List[int]) -> Feed:
        """Appends tokens (ids, or -1 - slot) and says how they are written and read."""
        first = self.length
        self.tokens += tokens
        ordinals = np.arange(first, self.length)
        context = tuple(ancestor.segment() for ancestor in self.ancestors)
        return Feed(
            read=Read(context, self.segment(), rows=len(tokens), ordinal=first),
            tokens=np.array(tokens),
            positions=self.start + ordinals,
            write_page=np.array(self.pages)[ordinals // self.page_size],
            write_offset=ordinals % self.page_size,
            slot=self.slot,
        )


@dataclass(frozen=True)
class Feed:
    """Consecutive rows of one sequence in a step."""

    read: Read
    tokens: np.ndarray
    positions: np.ndarray
    write_page: np.ndarray
    write_offset: np.ndarray
    slot: int


def step_inputs(feeds: List[Feed], layout: StepLayout, *, sampled: bool = True) -> StepInputs:
    """A step that feeds all of `feeds` and samples after each one's last row, greedily, with logprobs."""
    order, work = layout.backend.lay_out(Reads.of([feed.read for feed in feeds]), layout.capacity)
    feeds = [feeds[i] for i in order]
    last_row = np.cumsum([feed.read.rows for feed in feeds]) - 1
    chosen = feeds if sampled else []
    zeros = np.zeros(len(chosen), np.int32)
    return StepInputs(
        *(np.concatenate([getattr(feed, name) for feed in feeds]) for name in StepInputs._fields[:4]),
        work=work,
        sample=SampleInputs(
            row=last_row[: len(chosen)],
            slot=np.array([feed.slot for feed in chosen], np.int32),
            branch_key=zeros,
            position=np.array([feed.positions[-1] + 1 for feed in chosen], np.int32),
            count_fed=zeros,
        ),
    )
