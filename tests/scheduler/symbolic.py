"""A device in pure Python that does what a step says, with hashes in the place of tensors.

The KV of a position is a hash of its token, its rotary position and everything that its row attended to, so a
token sampled from it is right only if every position before it was written, read and placed as it should
be. Rows of a step run in lockstep: all of them write before any of them reads.

What a free page holds is forgotten (`forget`), and reading a position that nobody has written raises.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from scheduler.sampling import SamplingParams
from scheduler.step import Entry, Sample, SegmentRead, SlotSetup, Step
from tests.scheduler.alphabet import LETTERS

Path = tuple[tuple[int, int], ...]


class SymbolicModel:
    """Chooses tokens by hash, out of `follows[last token]` or else `tokens`: repetitions make odds."""

    def __init__(
        self, tokens: Sequence[int], follows: dict[int, Sequence[int]] | None = None, seed: int = 0
    ) -> None:
        self._tokens = tokens
        self._follows = follows or {}
        self._seed = seed

    def kv(self, token: int, position: int, attended: int) -> int:
        """What a row writes, and what it reads: `attended` is the sum of the KV that it attends to."""
        return hash((token, position, attended & 0xFFFFFFFFFFFF, self._seed))

    def choose(
        self,
        read: int,
        fed: int,
        path: Path,
        position: int,
        sampling: SamplingParams,
        given: Iterable[int],
        generated: Iterable[int],
    ) -> int:
        """The token at `position`; `given` and `generated` count only for sampling with penalties."""
        key: tuple[object, ...] = (read, path, position, sampling.seed, sampling.temperature)
        if sampling.uses_penalties:
            seen = tuple(sorted({*given, *generated}))
            key += (sampling.repetition_penalty, seen, tuple(sorted(generated)))
        tokens = self._follows.get(fed, self._tokens)
        return tokens[(hash(key) >> 5) % len(tokens)]


TALKS_ON = SymbolicModel(LETTERS)  # and so reaches every limit


@dataclass(slots=True, eq=False)
class Cell:
    """One KV position; `value` is None until its row has read what it attends to."""

    token: int
    position: int
    request: str
    value: int | None = None
    replaces: Cell | None = None  # what a shared page held there before


@dataclass(slots=True)
class Slot:
    owner: tuple[str, int] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    last: int | None = None
    given: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)


class SymbolicDevice:
    """Executes steps in the order of their launch.

    `is_shared(page)` says whether a page may be read by others than the request that writes it: such a page
    may be written only with what it holds already. `fed` are the tokens of the last step's entries.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_slots: int,
        model: SymbolicModel,
        is_shared: Callable[[int], bool] = lambda page: False,
    ) -> None:
        self.page_size = page_size
        self.model = model
        self.slots = [Slot() for _ in range(num_slots)]
        self.fed: list[list[int]] = []
        self._pages: list[list[Cell | None]] = [[None] * page_size for _ in range(num_pages)]
        self._is_shared = is_shared

    def forget(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._pages[page] = [None] * self.page_size

    def execute(self, step: Step) -> tuple[Sample, ...]:
        """Samples of the entries that sample, in the step's order."""
        self._check_form(step)
        for setup in step.slots:
            self._set_up(setup)
        rows = [self._write(entry) for entry in step.entries]
        self.fed = [[cell.token for cell in cells] for cells in rows]
        writer = {cell: index for index, cells in enumerate(rows) for cell in cells}
        for index in range(len(rows)):
            self._compute(index, step.entries, rows, writer)
        return tuple(
            self._sample(entry, cells, fresh={setup.slot for setup in step.slots})
            for entry, cells in zip(step.entries, rows, strict=True)
            if entry.samples
        )

    # --- what a step must look like --------------------------------------------------------------------

    def _check_form(self, step: Step) -> None:
        sampled = [entry.slot for entry in step.entries if entry.samples]
        assert len(set(sampled)) == len(sampled), "two entries sample into one slot"
        assert {setup.slot for setup in step.slots} <= set(sampled), "a slot is set up that nobody uses"
        assert len({setup.slot for setup in step.slots}) == len(step.slots), "a slot is set up twice"
        segments = [(entry.request_id, entry.segment) for entry in step.entries]
        assert len(set(segments)) == len(segments), "two entries write one segment"
        seen: dict[int, int] = {}
        written = [place for entry in step.entries for place in self._places(entry)]
        assert len(set(written)) == len(written), "two rows write one position"
        for entry in step.entries:
            assert (entry.slot is not None) == entry.samples
            assert entry.rows >= 1
            assert entry.rows == (1 if entry.tokens is None else len(entry.tokens))
            assert entry.own.length == entry.ordinal + entry.rows
            for read in (*entry.context, entry.own):
                assert read.length > 0, "an empty segment is read"
                assert len(read.pages) == -(-read.length // self.page_size)
                for page, filled in self._filled(read):
                    if not self._is_shared(page):
                        assert seen.setdefault(page, filled) == filled, "a page has two lengths in one step"

    def _places(self, entry: Entry) -> Iterator[tuple[int, int]]:
        for ordinal in range(entry.ordinal, entry.ordinal + entry.rows):
            page, offset = divmod(ordinal, self.page_size)
            yield entry.own.pages[page], offset

    def _filled(self, read: SegmentRead) -> Iterator[tuple[int, int]]:
        for index, page in enumerate(read.pages):
            yield page, min(self.page_size, read.length - index * self.page_size)

    # --- what a step does ------------------------------------------------------------------------------

    def _set_up(self, setup: SlotSetup) -> None:
        if not setup.sampling.uses_penalties:
            assert not setup.given
            assert not setup.generated
        self.slots[setup.slot] = Slot(None, setup.sampling, None, [*setup.given], [*setup.generated])

    def _write(self, entry: Entry) -> list[Cell]:
        tokens = entry.tokens
        if tokens is None:
            assert entry.slot is not None
            slot = self.slots[entry.slot]
            assert slot.owner == (entry.request_id, entry.branch), "the slot's last token is another branch's"
            assert slot.last is not None
            tokens = (slot.last,)
        cells: list[Cell] = []
        for row, (page, offset) in enumerate(self._places(entry)):
            cell = Cell(tokens[row], entry.start + row, entry.request_id)
            if self._is_shared(page):
                cell.replaces = self._pages[page][offset]
                assert cell.replaces is not None
            self._pages[page][offset] = cell
            cells.append(cell)
        return cells

    def _compute(
        self, index: int, entries: Sequence[Entry], rows: list[list[Cell]], writer: dict[Cell, int]
    ) -> None:
        if rows[index][-1].value is not None:
            return
        entry = entries[index]
        attended = 0
        own_before = SegmentRead(entry.own.pages, entry.ordinal)
        for read in (*entry.context, own_before):
            for cell in self._cells(read, entry.request_id):
                if cell.value is None:
                    self._compute(writer[cell], entries, rows, writer)
                assert cell.value is not None
                attended += cell.value
        for cell in rows[index]:
            cell.value = self.model.kv(cell.token, cell.position, attended)
            if cell.replaces is not None:
                assert cell.replaces.value == cell.value, "a shared page is overwritten"
                cell.replaces = None
            attended += cell.value

    def _cells(self, read: SegmentRead, request: str) -> Iterator[Cell]:
        for ordinal in range(read.length):
            page, offset = divmod(ordinal, self.page_size)
            cell = self._pages[read.pages[page]][offset]
            assert cell is not None, f"position {ordinal} of pages {read.pages} was never written"
            assert cell.request == request or self._is_shared(read.pages[page]), (
                "another request's KV is read"
            )
            yield cell

    def _sample(self, entry: Entry, cells: list[Cell], fresh: set[int]) -> Sample:
        assert entry.slot is not None
        slot = self.slots[entry.slot]
        last = cells[-1]
        if entry.slot not in fresh:
            assert slot.owner == (entry.request_id, entry.branch), "the slot is set for another branch"
            assert entry.rows == 1
            slot.generated.append(last.token)
        assert last.value is not None
        slot.last = self.model.choose(
            last.value,
            last.token,
            entry.path,
            last.position + 1,
            slot.sampling,
            slot.given,
            slot.generated,
        )
        slot.owner = (entry.request_id, entry.branch)
        return Sample(slot.last)


def unique_kv_tokens(entries: Iterable[Entry], page_size: int) -> int:
    """Distinct KV positions that a step reads: a page that several rows read counts once."""
    filled: set[tuple[int, int]] = set()
    for entry in entries:
        for read in (*entry.context, entry.own):
            for index, page in enumerate(read.pages):
                filled.add((page, min(page_size, read.length - index * page_size)))
    return sum(length for _, length in filled)


def widths(step: Step) -> Counter[str]:
    """How many branches of each request advance."""
    advanced = {(entry.request_id, entry.branch) for entry in step.entries}
    return Counter(request_id for request_id, _ in advanced)


def rows_by_request(step: Step) -> dict[str, int]:
    """How many rows of each request are computed."""
    rows: dict[str, int] = defaultdict(int)
    for entry in step.entries:
        rows[entry.request_id] += entry.rows
    return rows
