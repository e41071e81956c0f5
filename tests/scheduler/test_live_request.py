"""What a request tells, in order, and what it measures."""

from __future__ import annotations

import pytest

from scheduler.events import (
    BranchInfo,
    Event,
    Finished,
    Joined,
    StageFinished,
    StageStarted,
    Started,
    TokenEmitted,
    WidthChanged,
)
from scheduler.grammars import MULTIVERSE
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage, Stage, TagProgram
from scheduler.request import Request, Slo
from scheduler.sampling import SamplingParams
from scheduler.search import Match
from scheduler.step import Sample
from scheduler.stopping import FinishReason, Stopping
from tests.scheduler.alphabet import EOS, ID, LETTERS, STOP, tokens
from tests.scheduler.drafts import Bench
from tests.scheduler.symbolic import SymbolicModel
from tests.scheduler.world import Setting, World, serve

A, B, C, D = tokens("a"), tokens("b"), tokens("c"), tokens("d")
COUNTS = SymbolicModel(LETTERS, {A[0]: B, B[0]: C, C[0]: D, D[0]: [EOS]})
"""Says the next letter, and then ends."""
TALKS_ON = SymbolicModel(A)


def stopping(max_tokens: int, **more: object) -> Stopping:
    return Stopping(max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def serial(max_tokens: int, prefix: tuple[int, ...] = (), **more: object) -> SerialStage:
    return SerialStage(prefix=prefix, stopping=stopping(max_tokens, **more))


def fork(join: str, *prefixes: tuple[int, ...], max_tokens: int = 2) -> ParallelStage:
    specs = (
        BranchSpec(prefix=p, stopping=stopping(max_tokens), label=str(n)) for n, p in enumerate(prefixes)
    )
    return ParallelStage(branches=tuple(specs), join=join)


def request(*stages: Stage, prompt: tuple[int, ...] = A, **more: object) -> Request:
    return Request(id="r", prompt=prompt, program=Plan(stages=stages), **more)  # type: ignore[arg-type]


def said(world: World) -> list[Event]:
    return world.events["r"]


def told(events: list[Event]) -> list[object]:
    """Events without their measures."""
    short: list[object] = []
    for event in events:
        match event:
            case TokenEmitted(branch=branch, sample=sample):
                short.append((branch, sample.token))
            case StageStarted(stage=stage, branches=infos):
                short.append(("stage", stage, [info.branch for info in infos]))
            case StageFinished(stage=stage, branch=branch, reason=reason, final=final):
                short.append(("end", stage, branch, reason.value, final))
            case Joined(stage=stage, branches=branches):
                short.append(("joined", stage, branches))
            case WidthChanged(width=width, wanted=wanted):
                short.append(("width", width, wanted))
            case _:
                short.append(type(event).__name__)
    return short


@pytest.mark.parametrize("in_flight", [0, 1])
def test_the_story_of_a_request_that_forks_and_joins(in_flight: int) -> None:
    stages = (serial(9, eos_ids=frozenset({EOS})), fork("kv", B, C), serial(1, prefix=A))
    setting = Setting(policy="eager", in_flight=in_flight)
    assert told(said(serve([request(*stages)], setting, COUNTS))) == [
        "Started",
        ("stage", 0, [0]),
        (0, B[0]),
        (0, C[0]),
        (0, D[0]),
        ("end", 0, 0, "eos", False),
        ("stage", 1, [1, 2]),
        ("width", 2, 2),
        (1, C[0]),
        (2, D[0]),
        (1, D[0]),
        ("end", 1, 1, "max_tokens", True),
        (2, EOS),
        ("end", 1, 2, "max_tokens", True),
        ("joined", 1, (1, 2)),
        ("stage", 2, [0]),
        ("width", 1, 1),
        (0, B[0]),
        ("end", 2, 0, "max_tokens", True),
        "Finished",
    ]


def test_stages_tell_what_they_force_and_who_opened_them() -> None:
    world = serve([request(serial(1, prefix=C), fork("none", B, D))], Setting(), TALKS_ON)
    opened = [event.branches for event in said(world) if isinstance(event, StageStarted)]
    assert opened == [
        (BranchInfo(0, 0, "", C),),
        (BranchInfo(1, 0, "0", B), BranchInfo(2, 0, "1", D)),
    ]


def test_branches_that_are_not_joined_end_the_request() -> None:
    world = serve([request(fork("none", B, C))], Setting(policy="eager", in_flight=0), COUNTS)
    assert told(said(world))[-4:] == [
        (2, EOS),
        ("end", 0, 2, "max_tokens", True),
        ("end", 0, 0, "forked", True),
        "Finished",
    ]


def test_after_a_kv_join_the_branches_are_read_in_their_order() -> None:
    world = serve([request(serial(2), fork("kv", B, C * 2, D), serial(1, prefix=A))], Setting(), TALKS_ON)
    after = world.steps[-1].entries[-1]
    assert after.start == 1 + 2 + 2 + 2, "after the longest branch"
    written = {entry.branch: entry.own.pages for step in world.steps for entry in step.entries}
    assert [read.pages for read in after.context[1:]] == [written[branch] for branch in (1, 2, 3)]


def test_a_dropped_stop_is_named_and_not_emitted() -> None:
    world = serve([request(serial(9, stop_ids=frozenset(D)))], Setting(), COUNTS)
    *_, token, end, _ = said(world)
    assert isinstance(token, TokenEmitted)
    assert token.sample.token == C[0]
    assert isinstance(end, StageFinished)
    assert (end.reason, end.stop, end.completion_tokens, end.final) == (FinishReason.STOP, D[0], 2, True)


def test_a_token_that_ends_the_text_in_two_ways_is_the_models_own_end() -> None:
    world = serve([request(serial(9, stop_ids=frozenset(D), eos_ids=frozenset(D)))], Setting(), COUNTS)
    end = said(world)[-2]
    assert isinstance(end, StageFinished)
    assert end.reason is FinishReason.EOS


def test_a_stop_string_is_named_and_its_tokens_are_emitted() -> None:
    world = serve([request(serial(9, stop_strings=("cd", "bcd")))], Setting(), COUNTS)
    *_, token, end, _ = said(world)
    assert isinstance(token, TokenEmitted)
    assert token.sample.token == D[0]
    assert isinstance(end, StageFinished)
    assert (end.reason, end.stop) == (FinishReason.STOP, Match("bcd", 3)), "the one that began first"


def test_a_stop_string_does_not_reach_back_before_its_stage() -> None:
    stages = (serial(1), serial(9, stop_strings=("bc",), eos_ids=frozenset({EOS})))
    ends = [e for e in said(serve([request(*stages)], Setting(), COUNTS)) if isinstance(e, StageFinished)]
    assert [end.reason for end in ends] == [FinishReason.MAX_TOKENS, FinishReason.EOS]


def test_the_context_ends_a_stage_and_all_that_would_follow() -> None:
    world = serve([request(serial(9), serial(9), prompt=A * 3)], Setting(max_context=6), TALKS_ON)
    assert told(said(world))[-4:] == [
        ("end", 0, 0, "context", False),
        ("stage", 1, [0]),
        ("end", 1, 0, "context", True),
        "Finished",
    ]


def test_branches_without_room_end_at_once() -> None:
    stages = (serial(2), fork("kv", B * 3, B), serial(1, prefix=C))
    world = serve([request(*stages, prompt=A * 3)], Setting(max_context=7, policy="eager"), TALKS_ON)
    assert told(said(world))[-7:] == [
        ("stage", 1, [1, 2]),
        ("end", 1, 1, "context", True),
        (2, A[0]),
        ("end", 1, 2, "context", True),
        ("joined", 1, (1, 2)),
        ("end", 1, 0, "context", True),
        "Finished",
    ]


@pytest.mark.parametrize("join", ["kv", "reprefill"])
def test_a_join_that_fills_the_context_ends_the_request(join: str) -> None:
    stages = (fork(join, B, max_tokens=2), serial(1, prefix=C))
    world = serve([request(*stages, prompt=A * 3)], Setting(max_context=6), TALKS_ON)
    assert told(said(world))[-3:] == [("joined", 0, (1,)), ("end", 0, 0, "context", True), "Finished"]


def test_usage_counts_all_branches_and_the_longest_chain() -> None:
    stages = (
        serial(3),
        ParallelStage(
            branches=(
                BranchSpec(stopping=stopping(2), prefix=B),
                BranchSpec(stopping=stopping(5), prefix=B, stages=(fork("reprefill", C, C), serial(1))),
            ),
            join="kv",
        ),
        serial(4, prefix=C),
    )
    usage = serve([request(*stages, prompt=A * 10)], Setting(), TALKS_ON).finished("r").usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.preemptions) == (10, 0, 0)
    assert usage.completion_tokens == 3 + 2 + (5 + 2 + 2 + 1) + 4
    assert usage.critical_path_tokens == 3 + (5 + 2 + 1) + 4


def test_cached_tokens_are_those_of_the_prompt() -> None:
    world = World(Setting(page_size=4), TALKS_ON)
    world.run([request(serial(1, prefix=B * 8), prompt=A * 9)])
    again = Request(id="s", prompt=A * 9, program=Plan(stages=(serial(1, prefix=B * 8),)))
    world.run([again])
    started = world.events["s"][0]
    assert isinstance(started, Started)
    assert (started.prompt_tokens, started.cached_tokens) == (9, 9)
    assert world.finished("s").usage.cached_tokens == 9


def test_who_has_forked_finds_every_full_page_of_its_prompt_again() -> None:
    """No token is sampled from the prompt any more, so that its last page is of use as well."""
    bench = Bench()
    live = bench.live(fork("kv", B, C), prompt=8)
    draft = bench.draft()
    for branch in live.runnable():
        draft.add(live, branch, 16)
    live.publish_prefix()
    live.preempt()
    live.resume(1.0)
    assert live.segments[0].computed == 8


def test_after_a_preemption_a_branch_reads_again_what_stands_before_it() -> None:
    bench = Bench()
    live = bench.live(fork("kv", B, C), prompt=7)
    for _ in range(2):
        draft = bench.draft()
        for branch in live.runnable():
            draft.add(live, branch, 16)
    live.preempt()
    live.resume(1.0)
    root, *_ = live.segments.values()
    assert all(branch.pieces()[0] == (root, 7) for branch in live.runnable() if not branch.in_flight)
    assert [branch.complete for branch in live.branches.values()] == [0, 0, 0]


def test_pages_that_one_branch_holds_are_no_pages_for_another() -> None:
    """The first has a page for a token that is under way; the second needs one for what it begins with."""
    bench = Bench()
    live = bench.live(fork("kv", B * 4, C * 4, max_tokens=9), prompt=8)
    first, _ = live.runnable()
    for rows in (16, 1):
        bench.draft().add(live, first, rows)
    assert [len(segment.pages) for segment in live.segments.values()] == [2, 2, 0]
    assert live.reserved_pages(0.0) == 1


def test_timing_is_of_the_whole_request() -> None:
    setting = Setting(policy="off", in_flight=0, buckets=(8,), late_by=1.0)
    slow, fast = Slo(tpot=0.004, ttft=1.0), Slo(tpot=0.0001, ttft=0.0001)
    for slo, met in ((slow, True), (fast, False)):
        world = World(setting, TALKS_ON)
        world.now = 5.0
        world.run([request(serial(4), fork("none", B, C), slo=slo)])
        finished = world.finished("r")
        emitted = [forecast.seconds for forecast in world.forecasts]
        timing = finished.timing
        assert timing.queue == 0.0
        assert timing.ttft == pytest.approx(emitted[0])
        assert timing.tpot == pytest.approx(sum(emitted[1:]) / (finished.usage.completion_tokens - 1))
        assert timing.total == pytest.approx(sum(emitted))
        assert (timing.tpot_slo_met, timing.ttft_slo_met) == (met, met)


def test_a_request_without_a_token_meets_its_tpot_target() -> None:
    model = SymbolicModel([EOS])
    world = serve([request(serial(4, eos_ids=frozenset({EOS})))], Setting(), model)
    assert told(said(world)) == ["Started", ("stage", 0, [0]), ("end", 0, 0, "eos", True), "Finished"]
    finished = world.finished("r")
    assert (finished.usage.completion_tokens, finished.timing.tpot) == (0, 0.0)
    assert finished.timing.tpot_slo_met


def test_a_tag_is_emitted_and_the_fork_after_it_told() -> None:
    program = TagProgram(grammar=MULTIVERSE, stopping=stopping(40), branch_max_tokens=12)
    chain = tokens("<Goal><Outline>1:</Goal>")
    model = SymbolicModel(
        tokens("</Path>"), dict(zip((*A, *chain), ([t] for t in chain), strict=False)) | {ID["\n"]: [STOP]}
    )
    world = serve([Request(id="r", prompt=A, program=program)], Setting(), model)
    story = told(said(world))
    assert story[: len(chain) + 2] == ["Started", ("stage", 0, [0]), *((0, token) for token in chain)]
    assert story[len(chain) + 2 : len(chain) + 4] == [("end", 0, 0, "forked", False), ("stage", 1, [1])]


def test_a_fork_of_the_model_opens_where_its_worst_case_just_fits() -> None:
    """The trunk's text, what it may say after the join and a page more, and what the branch may hold.
    With pages of one token, each token counts."""
    chain = tokens("<Goal><Outline>1:</Goal>")
    says = dict(zip((*A, *chain), ([t] for t in chain), strict=False))
    program = TagProgram(grammar=MULTIVERSE, stopping=stopping(40), branch_max_tokens=12)

    def opens(num_pages: int) -> bool:
        setting = Setting(num_pages=num_pages, page_size=1, prefix_cache=False)
        world = World(setting, SymbolicModel(tokens("</Path>"), says))
        world.add(Request(id="r", prompt=A, program=program))
        world.run_until(lambda: world.emitted("r") > len(chain))
        return any(event[:2] == ("stage", 1) for event in told(said(world)) if isinstance(event, tuple))

    before = 1 + len(chain)
    needed = before + (1 + 40 - before) + 1 + 12
    assert opens(needed)
    assert not opens(needed - 1)


def test_forks_and_joins_begin_a_new_pace() -> None:
    bench = Bench()
    live = bench.live(serial(1), fork("kv", B, C, max_tokens=1), serial(1, prefix=A))
    resumed = []
    for now in (2.0, 3.0, 4.0):
        draft = bench.draft()
        for branch in live.runnable():
            draft.add(live, branch, 16)
        for entry in draft.entries:
            if entry.samples:
                live.accept(entry, Sample(A[0]), now)
        resumed.append(live.pace.resumed)
    assert resumed == [2.0, 3.0, 3.0]


def test_a_width_is_told_when_it_changes() -> None:
    stages = (fork("none", B, C, D, max_tokens=4),)
    world = serve([request(*stages)], Setting(policy="cap:2", in_flight=0), TALKS_ON)
    widths = [event for event in told(said(world)) if event[0] == "width"]  # type: ignore[index]
    assert widths == [("width", 2, 3), ("width", 2, 2), ("width", 1, 1)]


def test_sampling_of_a_stage_replaces_the_requests() -> None:
    hot, cold = SamplingParams(temperature=1.0, seed=5), SamplingParams(seed=1)
    stage = SerialStage(stopping=stopping(1), sampling=hot)
    world = serve([request(serial(1), stage, serial(1), sampling=cold)], Setting(), TALKS_ON)
    setups = [setup.sampling for step in world.steps for setup in step.slots]
    assert setups == [cold, hot, cold]


def test_finished_is_the_last_event_and_started_the_first() -> None:
    events = said(serve([request(fork("none", B, C))], Setting(policy="eager"), TALKS_ON))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Started | Finished) for event in events) == 2


def test_branches_divide_evenly_what_their_parent_may_hold() -> None:
    live = Bench(num_pages=20).live(fork("kv", B, C), prompt=6)
    assert [branch.allowance for branch in live.runnable()] == [(20 - 2 - 1) // 2] * 2


def test_it_should_find_a_share_of_the_pages_that_it_may_still_need() -> None:
    bench = Bench()
    live = bench.live(serial(30), prompt=10)  # ten pages in all
    assert [live.reserved_pages(share) for share in (0.0, 0.5, 1.0)] == [3, 5, 10]
    bench.draft().add(live, live.runnable()[0], 10)
    assert [live.reserved_pages(share) for share in (0.0, 0.5, 1.0)] == [0, 3, 7]
