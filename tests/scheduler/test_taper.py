"""What the controller promises, in whatever state it finds the requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from scheduler.controller import ControllerConfig
from scheduler.request import Request, Slo
from scheduler.step import ScheduledStep
from tests.scheduler.alphabet import PLAIN
from tests.scheduler.strategies import RELAXED, examples, loads, plans, serving
from tests.scheduler.symbolic import SymbolicModel, widths
from tests.scheduler.world import Setting, World, roomy

MODEL = SymbolicModel(PLAIN)
STRICT = ControllerConfig(fill=False)
BUCKETS = (4, 8, 16, 32, 64)
TAPERS = st.sampled_from(["taper", "taper:linear", "taper:concave", "taper:priority", "taper:paper"])
settings = serving.map(lambda setting: replace(setting, buckets=BUCKETS, late_by=1.0, arrive_after=0))
steps = st.integers(0, 25)
NEVER = st.just(Slo(tpot=math.inf, ttft=math.inf))
crowds = loads(plans, least=2, slos=st.sampled_from([RELAXED, Slo(tpot=0.006, ttft=0.05)]))


def planned(
    load: Sequence[Request],
    setting: Setting,
    steps: int,
    policy: str,
    controller: ControllerConfig = STRICT,
    stall: float = 0.0,
) -> ScheduledStep | None:
    """The step that `policy` makes of the state after so many steps without extras, and after a stall."""
    world = World(replace(roomy([*load], setting), policy="off", controller=STRICT, reserve=1.0), MODEL)
    for request in load:
        world.add(request)
    for _ in range(steps):
        if not world.scheduler.idle:
            world.step()
    settings_before = world.scheduler.controller.config
    chunking = {"max_chunk": settings_before.max_chunk, "prompt_floor": settings_before.prompt_floor}
    world.scheduler.controller.set_policy(policy)
    world.scheduler.controller.config = replace(controller, **chunking)
    world.now += stall
    return None if world.scheduler.idle else world.launch()


def advanced(made: ScheduledStep | None) -> int:
    """Branches that advance."""
    return 0 if made is None else widths(made.step).total()


@examples(60)
@given(crowds, settings, steps, TAPERS, st.sampled_from([0.0, 0.3, 0.8, 1.0, None]), st.booleans())
def test_no_step_is_predicted_beyond_its_budget(
    load: list[Request], setting: Setting, steps: int, policy: str, rho: float | None, fill: bool
) -> None:
    made = planned(load, setting, steps, policy, ControllerConfig(rho=rho, fill=fill))
    assert made is None or made.forecast.seconds <= made.forecast.budget_seconds + 1e-12


@examples(60)
@given(crowds, settings, steps, st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2))
def test_more_slack_never_lets_fewer_branches_run(
    load: list[Request], setting: Setting, steps: int, shares: list[float]
) -> None:
    few, many = (
        planned(load, setting, steps, "taper", ControllerConfig(rho=rho, fill=False))
        for rho in sorted(shares)
    )
    assert advanced(few) <= advanced(many)


@examples(60)
@given(loads(plans, least=2, slos=NEVER), settings, steps, TAPERS)
def test_an_infinite_target_gives_eager(
    load: list[Request], setting: Setting, steps: int, policy: str
) -> None:
    eager = planned(load, setting, steps, "eager")
    assume(eager is not None and not eager.forecast.deferred)
    assert advanced(planned(load, setting, steps, policy)) == advanced(eager)


@examples(60)
@given(crowds, settings, steps, TAPERS)
def test_without_slack_and_fill_it_is_off(
    load: list[Request], setting: Setting, steps: int, policy: str
) -> None:
    made = planned(load, setting, steps, policy, ControllerConfig(rho=0.0, fill=False))
    off = planned(load, setting, steps, "off", ControllerConfig(rho=0.0, fill=False))
    if off is not None and made is not None and not math.isinf(off.forecast.budget_seconds):
        assert made.step.entries == off.step.entries


@examples(60)
@given(crowds, settings, steps, TAPERS)
def test_if_everybody_is_late_it_is_off(
    load: list[Request], setting: Setting, steps: int, policy: str
) -> None:
    made, off = (planned(load, setting, steps, name, stall=100.0) for name in (policy, "off"))
    assert (made is None) == (off is None)
    if made is not None and off is not None:
        assert made.forecast.budget_seconds == off.forecast.budget_seconds
        assert made.step.entries == off.step.entries


@examples(60)
@given(crowds, settings, steps, TAPERS)
def test_no_branch_that_off_advances_is_left_out(
    load: list[Request], setting: Setting, steps: int, policy: str
) -> None:
    made, off = (planned(load, setting, steps, name) for name in (policy, "off"))
    if made is not None and off is not None:
        assert {(e.request_id, e.branch) for e in off.step.entries} <= {
            (e.request_id, e.branch) for e in made.step.entries
        }
