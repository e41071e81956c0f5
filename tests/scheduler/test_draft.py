from __future__ import annotations

from collections.abc import Iterator

import pytest

from scheduler.draft import StepDraft
from scheduler.predictor import Costs, StepLatencyModel, StepLoad
from scheduler.program import BranchSpec, ParallelStage, SerialStage
from scheduler.segment import Segment
from scheduler.step import Entry
from scheduler.stopping import Stopping
from tests.scheduler.drafts import Bench
from tests.scheduler.symbolic import unique_kv_tokens

FORK = ParallelStage(
    branches=tuple(BranchSpec(stopping=Stopping(max_tokens=9), prefix=(n, n)) for n in (1, 2, 3)), join="kv"
)


def serial(tokens: int = 9) -> SerialStage:
    return SerialStage(stopping=Stopping(max_tokens=tokens))


def only(draft: StepDraft) -> Entry:
    (entry,) = draft.entries
    return entry


def test_a_prompt_is_read_in_pieces_and_the_last_one_samples() -> None:
    bench = Bench()
    live = bench.live(serial(), prompt=6)
    (trunk,) = live.runnable()
    first = bench.draft()
    assert first.add(live, trunk, 4) == 4
    assert (only(first).rows, only(first).samples, only(first).slot) == (4, False, None)
    last = bench.draft()
    assert last.add(live, trunk, 4) == 2
    entry = only(last)
    assert (entry.start, entry.ordinal, entry.tokens, entry.samples) == (4, 4, (4, 5), True)
    assert entry.own.length == 6
    assert [setup.slot for setup in last.slots] == [entry.slot]


def test_more_of_a_segment_makes_its_entry_longer() -> None:
    bench = Bench()
    live = bench.live(serial(), prompt=6)
    (trunk,) = live.runnable()
    draft = bench.draft()
    draft.add(live, trunk, 2)
    draft.add(live, trunk, 3)
    entry = only(draft)
    assert (entry.ordinal, entry.rows, entry.tokens) == (0, 5, (0, 1, 2, 3, 4))
    assert (draft.rows, draft.rows_of(live), draft.load.kv_tokens) == (5, 5, 5)


def test_a_token_in_flight_is_fed_from_its_slot() -> None:
    bench = Bench()
    live = bench.live(serial())
    (trunk,) = live.runnable()
    bench.draft().add(live, trunk, 6)
    draft = bench.draft()
    assert draft.add(live, trunk, 1) == 1
    entry = only(draft)
    assert (entry.tokens, entry.slot, entry.start) == (None, trunk.slot, 6)
    assert draft.slots == []


def test_a_token_at_the_limit_is_not_fed() -> None:
    bench = Bench()
    live = bench.live(serial(tokens=2))
    (trunk,) = live.runnable()
    bench.draft().add(live, trunk, 6)
    bench.draft().add(live, trunk, 1)
    assert live.runnable() == [], "both tokens are on the way"


def test_a_parents_last_token_is_fed_once_and_without_sampling() -> None:
    bench = Bench()
    live = bench.live(serial(tokens=1), FORK)
    read = bench.draft()
    read.add(live, live.runnable()[0], 6)
    bench.accept(live, read)
    draft = bench.draft()
    rows = [draft.add(live, branch, 9) for branch in live.runnable()]
    assert rows == [3, 2, 2]
    seal, *branches = draft.entries
    assert (seal.samples, seal.start, seal.tokens) == (False, 6, (9,))
    assert [entry.samples for entry in branches] == [True] * 3
    assert all(entry.context == (seal.own,) for entry in branches)
    assert draft.load.kv_tokens == 7 + 3 * 2


def test_shared_kv_is_counted_once() -> None:
    bench = Bench()
    live = bench.live(FORK)
    draft = bench.draft()
    first, second, _ = live.runnable()
    assert draft.added(first, 0).kv_tokens == 0
    draft.add(live, first, 9)
    assert draft.load.kv_tokens == 6 + 2
    later = bench.draft()
    assert later.added(first, 0).kv_tokens == 6 + 2
    later.add(live, first, 1)
    assert later.load.kv_tokens == 6 + 3
    assert later.added(second, 0).kv_tokens == 0
    later.add(live, second, 2)
    assert later.load.kv_tokens == 6 + 3 + 2


def test_pages_shared_between_requests_are_counted_once() -> None:
    bench = Bench()
    first = bench.live(serial(), prompt=10, name="a")
    read = bench.draft()
    read.add(first, first.runnable()[0], 16)
    first.publish_prefix()
    second = bench.live(serial(), prompt=10, name="b")
    assert second.cached_tokens == 8
    draft = bench.draft()
    draft.add(first, first.runnable()[0], 1)
    assert draft.load.kv_tokens == 11
    assert draft.added(second.runnable()[0], 0).kv_tokens == 0
    draft.add(second, second.runnable()[0], 2)
    assert draft.load.kv_tokens == 11 + 2


def test_the_same_content_computed_twice_becomes_one_page() -> None:
    bench = Bench()
    lives = [bench.live(serial(), prompt=10, name=name) for name in "ab"]
    draft = bench.draft()
    for live in lives:
        draft.add(live, live.runnable()[0], 8)
    assert (draft.load.kv_tokens, bench.pool.owned) == (16, 4)
    for live in lives:
        live.publish_prefix()
    assert bench.pool.owned == 2
    after = bench.draft()
    for live in lives:
        after.add(live, live.runnable()[0], 1)
    assert after.load.kv_tokens == 8 + 1 + 1
    bench.pool.check(segment.pages for live in lives for segment in live.segments.values())


def test_what_is_affordable_is_a_matter_of_buckets() -> None:
    bench = Bench()
    live = bench.live(serial(), prompt=12)
    (trunk,) = live.runnable()
    draft = bench.draft()

    def affordable(rows: int, budget: float) -> int:
        draft.budget = budget
        return draft.affordable(trunk, rows)

    assert affordable(12, 0.009) == 0
    assert affordable(12, 0.0105) == 4
    assert affordable(12, 0.022) == 12
    assert affordable(3, 0.022) == 3
    draft.add(live, trunk, 3)
    assert affordable(9, 0.0105) == 1
    assert affordable(9, 1.0) == 9
    assert affordable(0, 1.0) == 0


def test_no_more_than_the_largest_bucket_is_added() -> None:
    bench = Bench()
    live = bench.live(serial(), prompt=30)
    draft = bench.draft()
    assert draft.affordable(live.runnable()[0], 30) == 16
    assert draft.add(live, live.runnable()[0], 30) == 16
    assert draft.room == 0
    assert draft.seconds() == pytest.approx(0.020 + 16e-4)


def test_without_pages_as_much_is_read_as_there_are() -> None:
    bench = Bench(num_pages=2)
    live = bench.live(serial(), prompt=12)
    draft = bench.draft()
    assert draft.add(live, live.runnable()[0], 12) == 8
    assert bench.asked == []
    assert draft.add(live, live.runnable()[0], 4, must=True) == 0
    assert bench.asked == [1]


def test_nobody_has_to_go_for_as_many_pages_as_there_are() -> None:
    bench = Bench(num_pages=2)
    live = bench.live(serial(), prompt=8)
    assert bench.draft().add(live, live.runnable()[0], 8, must=True) == 8
    assert bench.asked == []


def test_what_reads_an_ancestor_waits_until_all_of_it_is_computed() -> None:
    bench = Bench()
    live = bench.live(FORK)
    branch, *_ = live.runnable()
    bench.draft().add(live, branch, 7)  # of eight rows: the prompt's six and two of its own
    ancestor = branch.segment.chain[0]
    ancestor.drop(bench.pool)
    branch.complete = 0
    bench.pool.allocate(bench.pool.available - 1)
    draft = bench.draft()
    assert draft.add(live, branch, 9) == 4, "one page of the two that the prompt needs"
    assert only(draft).segment == ancestor.id


def test_nothing_is_left_of_a_branch_that_samples() -> None:
    bench = Bench()
    live = bench.live(serial())
    (trunk,) = live.runnable()
    draft = bench.draft()
    assert draft.left(trunk) == 6
    draft.add(live, trunk, 4)
    assert draft.left(trunk) == 2
    draft.add(live, trunk, 2)
    assert draft.left(trunk) == 0
    assert draft.sampling == {live}


def test_its_count_of_kv_is_the_entries_own() -> None:
    bench = Bench()
    lives = [bench.live(FORK, name="a"), bench.live(serial(), name="b", prompt=7)]
    for _ in range(4):
        draft = bench.draft()
        for live in lives:
            for branch in live.runnable():
                draft.add(live, branch, 2)
        assert draft.load.kv_tokens == unique_kv_tokens(draft.entries, page_size=4)


LONG = ParallelStage(branches=(BranchSpec(stopping=Stopping(max_tokens=9), prefix=(1,) * 6),) * 3)


@pytest.mark.parametrize("pieces", [(5,), (1, 4), (4, 1), (2, 2, 1)])
def test_an_entry_made_longer_costs_what_it_costs_at_once(pieces: tuple[int, ...]) -> None:
    bench = Bench()
    live = bench.live(LONG, prompt=6)
    first, second, _ = live.runnable()
    bench.draft().add(live, first, 6)
    draft = bench.draft()
    for rows in pieces:
        assert draft.add(live, second, rows) == rows
    chunk_context = sum(6 + position for position in (2, 3, 4, 5))
    assert draft.load == StepLoad(5, 6, 5, 2, chunk_context, 6 + 5)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_what_a_branch_would_add_is_what_it_adds(rows: int) -> None:
    bench = Bench()
    live = bench.live(LONG, prompt=6)
    branches = live.runnable()
    bench.draft().add(live, branches[0], 7)
    draft = bench.draft()
    for branch in branches:
        expected = draft.load.plus(draft.added(branch, rows))
        assert draft.add(live, branch, rows) == rows
        assert draft.load == expected


def test_an_ancestor_that_is_read_already_costs_nothing_whoever_reads_it() -> None:
    """The branch that forks itself has another chain than its sibling; both begin at the root."""
    bench = Bench()
    forks = BranchSpec(stopping=Stopping(max_tokens=1), prefix=(1, 2), stages=(FORK,))
    plain = BranchSpec(stopping=Stopping(max_tokens=9), prefix=(3, 4))
    live = bench.live(ParallelStage(branches=(forks, plain)))
    for rows in (9, 1):
        draft = bench.draft()
        for branch in live.runnable():
            draft.add(live, branch, rows)
        bench.accept(live, draft)
    draft = bench.draft()
    below = [branch for branch in live.runnable() if len(branch.segment.ancestors) == 2]
    (sibling,) = (branch for branch in live.runnable() if branch not in below)
    draft.add(live, sibling, 1)
    for branch in below:
        expected = draft.load.plus(draft.added(branch, 1))
        assert draft.add(live, branch, 1) == 1
        assert draft.load == expected


def test_a_branch_is_priced_with_what_is_still_to_be_read_before_it() -> None:
    bench = Bench()
    live = bench.live(LONG, prompt=6)
    assert bench.draft().added(live.runnable()[0], 2).raw_kv == 6 + 2


def test_a_price_is_that_of_what_the_branch_would_add() -> None:
    """Also for a page that two requests share: it is read already."""
    bench = Bench()
    lives = [bench.live(serial(), prompt=10, name="a")]
    read = bench.draft()
    read.add(lives[0], lives[0].runnable()[0], 16)
    lives[0].publish_prefix()
    lives.append(bench.live(serial(), prompt=9, name="b"))
    draft = bench.draft()
    draft.add(lives[0], lives[0].runnable()[0], 1)
    (branch,) = lives[1].runnable()
    assert draft.prices([branch]) == [(1, bench.latency.reading_seconds(draft.added(branch, 1)))]


# --- what it takes to plan ---------------------------------------------------------------------------------


class Counting(StepLatencyModel):
    """Counts what it is asked."""

    asked = lines = 0

    def reading_seconds(self, load: StepLoad) -> float:
        self.asked += 1
        return super().reading_seconds(load)

    def row_line(self, context: int) -> tuple[float, float]:
        self.lines += 1
        return super().row_line(context)


def test_branches_with_one_row_are_priced_by_one_line() -> None:
    costs = Costs(shared_kv=1e-4, private_kv=2e-4, items=3e-4, raw_kv=5e-4)
    latency = Counting({4: 0.010, 16: 0.020}, costs=costs)
    bench = Bench(latency=latency)
    live = bench.live(FORK)
    for _ in range(3):
        draft = bench.draft()
        for branch in live.runnable():
            draft.add(live, branch, 9)
        bench.accept(live, draft)
    draft = bench.draft()
    first, *others = live.runnable()
    draft.add(live, first, 1)
    latency.asked = latency.lines = 0
    prices = draft.prices(others)
    assert (latency.asked, latency.lines) == (0, 1)
    expected = [latency.reading_seconds(draft.added(branch, 1)) for branch in others]
    assert [seconds for _, seconds in prices] == pytest.approx(expected)


class Watched(tuple):
    """Ancestors that count how often they are looked through."""

    looks = 0

    def __iter__(self) -> Iterator[Segment]:
        Watched.looks += 1
        return super().__iter__()


def test_ancestors_that_the_step_reads_are_not_looked_through_again() -> None:
    bench = Bench()
    live = bench.live(FORK)
    first, second, _ = live.runnable()
    second.segment.ancestors = Watched(second.segment.ancestors)
    draft = bench.draft()
    unread = draft.added(second, 1)
    assert Watched.looks == 1
    draft.add(live, first, 9)
    assert draft.added(second, 1).shared_kv < unread.shared_kv + 6
    assert Watched.looks == 1


def test_what_is_affordable_is_found_by_bisection() -> None:
    latency = Counting({256: 0.5}, 2**-10)
    bench = Bench(num_pages=100, latency=latency)
    (trunk,) = bench.live(serial(), prompt=90).runnable()
    draft = bench.draft()
    draft.budget = 0.5 + 70 * 2**-10  # just enough for 70
    latency.asked = 0
    assert draft.affordable(trunk, 90) == 70
    assert latency.asked <= 3 + 8


def test_what_is_affordable_as_a_whole_is_not_searched_for() -> None:
    latency = Counting({256: 0.5}, 2**-10)
    bench = Bench(num_pages=100, latency=latency)
    (trunk,) = bench.live(serial(), prompt=90).runnable()
    draft = bench.draft()
    latency.asked = 0
    assert draft.affordable(trunk, 90) == 90
    assert latency.asked <= 3  # for the step, for one row more, and for all of them


def test_branches_of_a_fork_share_one_view_of_what_came_before() -> None:
    bench = Bench()
    live = bench.live(FORK)
    draft = bench.draft()
    for branch in live.runnable():
        draft.add(live, branch, 9)
    first, *others = (entry for entry in draft.entries if entry.samples)
    assert all(entry.context is first.context for entry in others)


def test_pages_that_are_published_are_not_looked_at_again() -> None:
    bench = Bench()
    live = bench.live(serial(), prompt=10)
    bench.draft().add(live, live.runnable()[0], 16)
    live.publish_prefix()
    pages = live.segments[0].pages
    live.publish_prefix()
    assert live.segments[0].pages is pages
