"""The quick ways of a draft say what the plain ones do: single rows, and prefixes that are read already."""

from __future__ import annotations

from unittest.mock import PropertyMock, patch

from hypothesis import given
from hypothesis import strategies as st

from scheduler.branch import Branch
from scheduler.draft import PrefixesRead
from scheduler.footprint import worst_case_pages
from scheduler.program import Plan, SerialStage
from scheduler.request import Request
from scheduler.stopping import Stopping
from tests.scheduler.alphabet import FOLLOWS, PLAIN, TALKATIVE
from tests.scheduler.strategies import RELAXED, examples, loads, plans, serving, tag_programs
from tests.scheduler.symbolic import SymbolicModel
from tests.scheduler.world import Setting, World, replace, serve


def tight(load: list[Request], setting: Setting, spare: int) -> Setting:
    """Hardly more pages than the largest request needs."""
    needed = max(worst_case_pages(each, setting.page_size, setting.max_context) for each in load)
    return replace(setting, num_pages=needed + spare)


def served_in_pieces(load: list[Request], setting: Setting, model: SymbolicModel) -> World:
    """As `serve`, but every row is added as any piece is."""
    with patch.object(Branch, "is_decoding", PropertyMock(return_value=False)):
        return serve(load, setting, model)


def assert_same(load: list[Request], setting: Setting, model: SymbolicModel) -> None:
    quick, plain = serve(load, setting, model), served_in_pieces(load, setting, model)
    assert quick.steps == plain.steps
    assert quick.forecasts == plain.forecasts
    assert quick.events == plain.events


@examples(50)
@given(loads(plans, least=2, most=6, slos=st.just(RELAXED)), serving, st.integers(0, 40))
def test_a_single_row_is_planned_as_a_piece_of_one_row_is(
    load: list[Request], setting: Setting, spare: int
) -> None:
    """With preemptions, shared prefixes, joins, and slots that change hands."""
    assert_same(load, tight(load, setting, spare), SymbolicModel(PLAIN))


@examples(30)
@given(loads(tag_programs, most=6), serving)
def test_so_it_is_under_forks_of_the_model(load: list[Request], setting: Setting) -> None:
    assert_same(load, setting, SymbolicModel(TALKATIVE, FOLLOWS))


def test_most_rows_are_single_ones() -> None:
    """Else the tests above compare nothing."""
    load = [
        Request(
            id=name,
            prompt=(1, 2, 3) * 4,
            program=Plan(stages=(SerialStage(stopping=Stopping(max_tokens=9)),)),
        )
        for name in "abc"
    ]
    decoding, told = Branch.is_decoding, list[bool]()

    def recorded(branch: Branch) -> bool:
        told.append(decoding.__get__(branch))
        return told[-1]

    with patch.object(Branch, "is_decoding", property(recorded)):
        serve(load, Setting(), SymbolicModel(PLAIN))
    assert sum(told) > len(told) / 2


@st.composite
def runs(draw: st.DrawFn) -> list[list[int]]:
    """Runs of pages, each behind one prefix alone: paths from the roots of a forest."""
    parents = [draw(st.integers(-1, page - 1)) for page in range(draw(st.integers(1, 12)))]
    drawn: list[list[int]] = []
    for _ in range(draw(st.integers(1, 8))):
        page, run = draw(st.integers(0, len(parents) - 1)), list[int]()
        while page >= 0:
            run.insert(0, page)
            page = parents[page]
        drawn.append(run + [100 + len(drawn)] * draw(st.integers(0, 2)))  # and pages that are not shared
    return drawn


@given(runs(), st.lists(st.booleans(), min_size=8, max_size=8))
def test_of_a_prefix_the_pages_that_are_read_already_are_known(
    drawn: list[list[int]], asked: list[bool]
) -> None:
    prefixes, pages = PrefixesRead(), set[int]()
    for run, ask in zip(drawn, asked, strict=False):
        count = sum(page < 100 for page in run)
        known = len(pages.intersection(run[:count]))
        if ask:
            assert prefixes.known(run, count) == known
        assert prefixes.add(run, count) == known
        pages.update(run[:count])
