from __future__ import annotations

from scheduler.branch import Branch
from scheduler.cursor import cursor
from scheduler.program import Plan, SerialStage
from scheduler.segment import Segment
from scheduler.stopping import Stopping
from tests.scheduler.alphabet import Alphabet


def branch(*segments: Segment) -> Branch:
    program = Plan(stages=(SerialStage(stopping=Stopping(max_tokens=1)),))
    made = Branch(1, None, (), "", cursor(program, Alphabet()), segments[-1])
    made.limit = 100
    return made


def chain(*lengths: tuple[int, int]) -> list[Segment]:
    """Segments under each other, of (tokens, computed)."""
    segments: list[Segment] = []
    for number, (length, computed) in enumerate(lengths):
        segment = Segment(number, 0, segments[-1].chain if segments else ())
        segment.extend(range(10 * number, 10 * number + length))
        segment.computed = computed
        segments.append(segment)
    return segments


def test_what_is_missing_is_computed_from_the_root_down() -> None:
    segments = chain((5, 4), (3, 3), (2, 0))
    replayed = branch(*segments)
    assert replayed.pieces() == [(segments[0], 1), (segments[2], 2)]
    assert replayed.backlog == 3


def test_ancestors_that_were_complete_are_looked_at_again_when_they_may_have_lost_their_pages() -> None:
    segments = chain((5, 5), (3, 3), (2, 0))
    decoding = branch(*segments)
    assert decoding.pieces() == [(segments[2], 2)]
    segments[0].computed = 0
    decoding.complete = 0
    assert decoding.pieces() == [(segments[0], 5), (segments[2], 2)]


def test_a_branch_waits_for_its_children() -> None:
    waiting = branch(*chain((5, 4)))
    waiting.open_children = 2
    assert (waiting.pieces(), waiting.backlog) == ([], 0)


def test_a_token_on_the_way_is_fed_only_from_the_slot_and_below_the_limit() -> None:
    (segment,) = chain((5, 5))
    flying = branch(segment)
    flying.in_flight = [object()]  # type: ignore[list-item]
    assert flying.backlog == 0, "it has no slot"
    flying.slot = 3
    assert flying.pieces() == [(segment, 1)]
    assert flying.backlog == 1
    flying.limit = 6
    assert flying.backlog == 0, "the token on the way is the last one"


def test_history_tells_given_from_generated() -> None:
    segments = chain((2, 2), (1, 1))
    segments[1].append(99)
    assert branch(*segments).history() == ((0, 1, 10), (99,))


def test_ancestors_known_to_be_complete_are_not_looked_through_again() -> None:
    segments = chain((5, 5), (3, 3), (2, 0))
    decoding = branch(*segments)
    assert decoding.backlog == 2
    assert decoding.complete == 2
    segments[0].computed = 0
    assert decoding.backlog == 2
