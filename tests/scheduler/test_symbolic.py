"""The symbolic device notices what it is there to notice."""

from __future__ import annotations

import pytest

from scheduler.sampling import SamplingParams
from scheduler.step import Entry, SegmentRead, SlotSetup, Step
from tests.scheduler.alphabet import LETTERS
from tests.scheduler.symbolic import SymbolicDevice, SymbolicModel


def entry(pages: tuple[int, ...], ordinal: int, *tokens: int, **more: object) -> Entry:
    fields: dict[str, object] = {
        "request_id": "r",
        "branch": 0,
        "segment": pages[0],
        "slot": None,
        "start": ordinal,
        "ordinal": ordinal,
        "rows": len(tokens) or 1,
        "tokens": tokens or None,
        "context": (),
        "own": SegmentRead(pages, ordinal + (len(tokens) or 1)),
        "samples": "slot" in more,
        "path": (),
    }
    return Entry(**(fields | more))  # type: ignore[arg-type]


def step(*entries: Entry, slots: tuple[int, ...] = ()) -> Step:
    setups = tuple(SlotSetup(slot, SamplingParams()) for slot in slots)
    return Step(0, entries, setups, 8)


def device(shared: frozenset[int] = frozenset()) -> SymbolicDevice:
    return SymbolicDevice(8, 2, 4, SymbolicModel(LETTERS), lambda page: page in shared)


def value(made: SymbolicDevice, page: int, offset: int) -> int | None:
    cell = made._pages[page][offset]
    assert cell is not None
    return cell.value


def test_an_unwritten_position_cannot_be_read() -> None:
    with pytest.raises(AssertionError, match="never written"):
        device().execute(step(entry((0,), 1, 5)))


def test_a_forgotten_page_cannot_be_read() -> None:
    made = device()
    made.execute(step(entry((0,), 0, 5)))
    made.forget([0])
    with pytest.raises(AssertionError, match="never written"):
        made.execute(step(entry((0,), 1, 5)))


def test_another_requests_kv_cannot_be_read_unless_it_is_shared() -> None:
    context = (SegmentRead((0,), 2),)
    for shared in (frozenset[int](), frozenset({0})):
        made = device(shared=frozenset())
        made.execute(step(entry((0,), 0, 5, 6)))
        made._is_shared = shared.__contains__
        other = step(entry((1,), 0, 7, request_id="s", context=context))
        if shared:
            made.execute(other)
        else:
            with pytest.raises(AssertionError, match="another request's"):
                made.execute(other)


def test_a_shared_page_is_overwritten_only_with_the_same() -> None:
    made = device()
    made.execute(step(entry((0,), 0, 5, 6)))
    made._is_shared = lambda page: True
    made.execute(step(entry((0,), 1, 6)))
    with pytest.raises(AssertionError, match="overwritten"):
        made.execute(step(entry((0,), 1, 7)))


@pytest.mark.parametrize(
    "other",
    [
        entry((0,), 0, 5, 7),
        entry((0,), 0, 5, 6, start=3),
        entry((0,), 0, 5, 6, context=(SegmentRead((4,), 1),)),
    ],
    ids=["token", "position", "context"],
)
def test_kv_depends_on_all_that_was_read(other: Entry) -> None:
    values = []
    for first in (entry((0,), 0, 5, 6), other):
        made = device()
        made.execute(step(entry((4,), 0, 3)))
        made.execute(step(first))
        values.append(value(made, 0, 1))
    assert values[0] != values[1]


def test_rows_of_a_step_see_what_the_step_writes() -> None:
    together, apart = device(), device()
    child = entry((2,), 0, 7, start=2, context=(SegmentRead((0,), 2),))
    together.execute(step(child, entry((0,), 0, 5, 6)))
    apart.execute(step(entry((0,), 0, 5)))
    apart.execute(step(entry((0,), 1, 6)))
    apart.execute(step(child))
    assert value(together, 2, 0) == value(apart, 2, 0)


def test_two_rows_cannot_write_one_position() -> None:
    with pytest.raises(AssertionError, match="one position"):
        device().execute(step(entry((0,), 0, 5), entry((0,), 0, 5, segment=9)))


def test_a_slot_belongs_to_the_branch_that_sampled_in_it() -> None:
    made = device()
    made.execute(step(entry((0,), 0, 5, slot=1), slots=(1,)))
    made.execute(step(entry((0,), 1, slot=1)))
    with pytest.raises(AssertionError, match="another branch"):
        made.execute(step(entry((1,), 0, slot=1, branch=2)))


def test_a_slot_feeds_what_was_sampled_last() -> None:
    made, told = device(), device()
    (first,) = made.execute(step(entry((0,), 0, 5, slot=1), slots=(1,)))
    made.execute(step(entry((0,), 1, slot=1)))
    told.execute(step(entry((0,), 0, 5, first.token)))
    assert value(made, 0, 1) == value(told, 0, 1)


def test_penalties_count_what_was_fed() -> None:
    model = SymbolicModel(range(1000))
    params = SamplingParams(presence_penalty=1.0)
    drawn = []
    for generated in ((), (5,), (5, 5)):
        drawn.append(model.choose(1, 5, (), 3, params, (1,), generated))
    assert len(set(drawn)) == 3
    assert model.choose(1, 5, (), 3, SamplingParams(), (), ()) == model.choose(
        1, 5, (), 3, SamplingParams(), (1,), (2,)
    )
