"""Random programs, requests and settings."""

from __future__ import annotations

from functools import cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from scheduler.controller import ControllerConfig
from scheduler.program import JOINS, BranchSpec, ParallelStage, Plan, SerialStage, Stage, TagProgram
from scheduler.request import Request, Slo
from scheduler.sampling import SamplingParams
from scheduler.stopping import Stopping
from tests.scheduler.alphabet import EOS, GRAMMARS, LETTERS, STOP
from tests.scheduler.world import Setting

RELAXED = Slo(tpot=1.0, ttft=10.0)  # everybody may start at once
SHARED = tuple(LETTERS * 3)  # what many prompts begin with


def examples(number: int, **more: int) -> settings:
    """The same `number` of examples in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=number, derandomize=True, suppress_health_check=slow, **more)


samplings = st.sampled_from(
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=7),
        SamplingParams(presence_penalty=0.5, seed=3),
        SamplingParams(repetition_penalty=1.5, frequency_penalty=0.1),
    ]
)
stage_samplings = st.sampled_from([None, None, None, SamplingParams(presence_penalty=1.0, seed=1)])
slos = st.sampled_from([RELAXED, Slo(tpot=0.006, ttft=0.05), Slo(tpot=1e-4, ttft=1e-3)])


stoppings = st.builds(
    Stopping,
    max_tokens=st.integers(1, 8),
    eos_ids=st.sampled_from([frozenset(), frozenset({EOS})]),
    stop_ids=st.sampled_from([frozenset(), frozenset({STOP})]),
    stop_strings=st.sampled_from([(), (), ("bab",), ("abc", "bc"), ("d", "ca")]),
)
prefixes = st.sampled_from([LETTERS[:length] for length in range(6)])
seeds = st.sampled_from([LETTERS[-length:] for length in range(1, 6)])  # prefixes that are not empty


joins = st.sampled_from(["", "", "", *JOINS])  # none: a serial stage


@cache
@st.composite
def stages(draw: st.DrawFn, depth: int, most: int = 3, least: int = 0) -> tuple[Stage, ...]:
    drawn: list[Stage] = []
    join = ""
    for _ in range(draw(st.integers(least, most))):
        if join == "none":
            break
        fed = join == "kv"
        join = draw(joins) if depth else ""
        if join:
            count = draw(st.integers(1, 4))
            seeded = fed or draw(st.booleans())  # all of them, or any
            branches = tuple(draw(branch_specs(depth - 1, seeded)) for _ in range(count))
            first_k = draw(st.integers(0, count))
            drawn.append(ParallelStage(branches=branches, join=join, first_k=first_k))
        else:
            drawn.append(
                SerialStage(
                    stopping=draw(stoppings),
                    prefix=draw(seeds if fed else prefixes),
                    sampling=draw(stage_samplings),
                )
            )
    return tuple(drawn)


@cache
@st.composite
def branch_specs(draw: st.DrawFn, depth: int, seeded: bool) -> BranchSpec:
    return BranchSpec(
        stopping=draw(stoppings),
        label=draw(st.sampled_from(["", "x"])),
        prefix=draw(seeds if seeded else prefixes),
        sampling=draw(stage_samplings),
        stages=draw(stages(depth, most=2)) if depth else (),
    )


plans = st.builds(Plan, stages=stages(2, least=1))

tag_programs = st.builds(
    TagProgram,
    grammar=st.sampled_from(GRAMMARS),
    stopping=st.builds(
        Stopping,
        max_tokens=st.integers(1, 60),
        eos_ids=st.just(frozenset({EOS})),
        stop_strings=st.sampled_from([(), ("aba",)]),
    ),
    branch_max_tokens=st.integers(3, 40),
    max_branches=st.integers(1, 3),
    max_depth=st.integers(0, 3),
)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    shared = SHARED[: draw(st.sampled_from([0, 0, 4, 8, 9, 24]))]
    own = LETTERS[draw(st.integers(0, 5)) :][: draw(st.integers(0, 8))]
    return (*shared, *own) or (LETTERS[0],)


@st.composite
def loads(
    draw: st.DrawFn,
    programs: st.SearchStrategy[Plan] | st.SearchStrategy[TagProgram],
    least: int = 1,
    most: int = 4,
    slos: st.SearchStrategy[Slo] = slos,
) -> list[Request]:
    """Requests that arrive in this order."""
    return [
        Request(
            id=f"r{number}",
            prompt=draw(prompts()),
            program=draw(programs),
            sampling=draw(samplings),
            slo=draw(slos),
            priority=draw(st.integers(-1, 1)),
        )
        for number in range(draw(st.integers(least, most)))
    ]


controllers = st.builds(
    ControllerConfig,
    rho=st.sampled_from([0.8, 1.0, None]),
    fill=st.booleans(),
    repay=st.sampled_from([0.0, 2.0, 8.0]),
)

serving = st.builds(
    Setting,
    policy=st.sampled_from(
        ["off", "cap:2", "cap:3", "eager", "taper", "taper", "taper:linear", "taper:priority", "taper:paper"]
    ),
    buckets=st.sampled_from([(1,), (2,), (3, 5), (8,), (4, 8, 16, 32), (64,)]),
    max_chunk=st.sampled_from([1, 3, 16]),
    prompt_floor=st.sampled_from([1, 4, 32]),
    page_size=st.integers(1, 5),
    spare_slots=st.sampled_from([0, 0, 64]),
    prefix_cache=st.booleans(),
    controller=controllers,
    reserve=st.sampled_from([0.0, 0.5, 1.0]),
    in_flight=st.sampled_from([0, 1]),
    arrive_after=st.sampled_from([0, 1, 7]),
    late_by=st.sampled_from([0.5, 1.0, 1.7]),
)
