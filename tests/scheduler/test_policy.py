from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy import Baseline, Eager, Extra, FixedCap, Greedy, Off, Taper, cheapest_first, policy
from scheduler.predictor import StepLatencyModel
from tests.scheduler.strategies import examples

MODELS = st.builds(
    StepLatencyModel,
    st.dictionaries(st.integers(1, 12), st.floats(0.001, 0.02), min_size=1).map(lambda d: d | {12: 0.02}),
)
ORDERS = st.sampled_from([*Taper.ORDERS])


@st.composite
def extras(draw: st.DrawFn, rows: st.SearchStrategy[int], most: int = 7) -> list[Extra]:
    costs = draw(st.lists(st.tuples(rows, st.floats(1e-6, 0.01)), max_size=most))
    groups = sorted(draw(st.lists(st.integers(0, 2), min_size=len(costs), max_size=len(costs))))
    priorities = draw(st.lists(st.integers(-1, 1), min_size=3, max_size=3))
    return [
        Extra(index, group, rows, seconds, priorities[group])
        for index, (group, (rows, seconds)) in enumerate(zip(groups, costs, strict=True))
    ]


baselines = st.builds(Baseline, st.integers(1, 8), st.floats(0.0, 0.02), st.floats(0.001, 0.1))


def fits(chosen: Sequence[Extra], baseline: Baseline, latency: StepLatencyModel) -> bool:
    rows = baseline.rows + sum(extra.rows for extra in chosen)
    if rows > latency.buckets.largest:
        return False
    seconds = baseline.seconds + sum(extra.seconds for extra in chosen)
    return latency.rows_seconds(rows) + seconds <= baseline.budget + 1e-12


@examples(150)
@given(extras(st.just(1)), baselines, MODELS)
def test_the_cheapest_first_admits_as_many_one_row_extras_as_any_choice_could(
    extras: list[Extra], baseline: Baseline, latency: StepLatencyModel
) -> None:
    admitted = Taper("linear").admit(extras, baseline, latency)
    best = max(
        count
        for count in range(len(extras) + 1)
        for chosen in combinations(extras, count)
        if not chosen or fits(chosen, baseline, latency)
    )
    assert len(admitted) == best


@examples(150)
@given(extras(st.integers(1, 4)), baselines, MODELS, st.one_of(ORDERS.map(Taper), st.builds(Greedy)))
def test_taper_never_exceeds_the_budget(
    extras: list[Extra], baseline: Baseline, latency: StepLatencyModel, taper: Taper | Greedy
) -> None:
    admitted = taper.admit(extras, baseline, latency)
    assert len(set(admitted)) == len(admitted)
    assert not admitted or fits(admitted, baseline, latency)


@examples(150)
@given(extras(st.integers(1, 4)), baselines, MODELS, ORDERS.map(Taper))
def test_in_its_order_taper_admits_all_that_fit(
    extras: list[Extra], baseline: Baseline, latency: StepLatencyModel, taper: Taper
) -> None:
    admitted = taper.admit(extras, baseline, latency)
    everybody = taper.admit(extras, baseline._replace(rows=0, budget=math.inf), latency)
    if len(admitted) < len(everybody):
        assert list(everybody[: len(admitted)]) == list(admitted)
        assert not fits(everybody[: len(admitted) + 1], baseline, latency)


@examples(100)
@given(extras(st.just(1), most=12), baselines, MODELS, st.floats(0, 0.1), ORDERS.map(Taper))
def test_more_slack_never_admits_less(
    extras: list[Extra], baseline: Baseline, latency: StepLatencyModel, more: float, taper: Taper
) -> None:
    few = taper.admit(extras, baseline, latency)
    many = taper.admit(extras, baseline._replace(budget=baseline.budget + more), latency)
    assert list(many[: len(few)]) == list(few)


@examples(50)
@given(extras(st.just(1), most=12), MODELS, st.one_of(ORDERS.map(Taper), st.builds(Greedy)))
def test_taper_without_a_limit_fills_the_largest_bucket(
    extras: list[Extra], latency: StepLatencyModel, taper: Taper | Greedy
) -> None:
    baseline = Baseline(2, 0.001, math.inf)
    assert len(taper.admit(extras, baseline, latency)) == min(len(extras), latency.buckets.largest - 2)


def test_taper_fills_a_bucket_that_is_paid_for() -> None:
    latency = StepLatencyModel({4: 0.010, 8: 0.020})
    extras = [Extra(number, 0, 1, 0.0) for number in range(6)]
    assert len(Taper().admit(extras, Baseline(2, 0.0, 0.010), latency)) == 2
    assert len(Taper().admit(extras, Baseline(2, 0.0, 0.019), latency)) == 2
    assert len(Taper().admit(extras, Baseline(2, 0.0, 0.020), latency)) == 6


def test_orders_differ_in_who_is_left_out() -> None:
    latency = StepLatencyModel({8: 0.010})
    extras = [Extra(0, 0, 1, 0.003), Extra(1, 0, 1, 0.002), Extra(2, 1, 1, 0.001), Extra(3, 1, 1, 0.001)]

    def admitted(order: str) -> list[int]:
        return [extra.candidate for extra in Taper(order).admit(extras, Baseline(1, 0.0, 0.0151), latency)]

    assert admitted("fcfs") == [0, 1]
    assert admitted("linear") == [2, 3, 1]
    assert admitted("concave") == [2, 0, 3]


def test_the_most_urgent_request_comes_first_and_of_equal_ones_the_oldest() -> None:
    priorities = [0, 0, 5, -1, 5]  # of the requests, the oldest first
    extras = [Extra(2 * group + i, group, 1, 0.0, priorities[group]) for group in range(5) for i in range(2)]
    admitted = Taper("priority").admit(extras, Baseline(5, 0.0, 0.010), StepLatencyModel({12: 0.010}))
    assert [extra.candidate for extra in admitted] == [4, 5, 8, 9, 0, 1, 2]


def test_the_papers_loop_takes_the_best_head_and_drops_who_does_not_fit() -> None:
    """On a staircase the next row of a full bucket is dear, whoever brings it."""
    latency = StepLatencyModel({8: 0.010})
    extras = [Extra(0, 0, 1, 0.003), Extra(1, 0, 1, 0.001), Extra(2, 1, 1, 0.002), Extra(3, 1, 1, 0.009)]
    admitted = Greedy().admit(extras, Baseline(1, 0.0, 0.0161), latency)
    assert [extra.candidate for extra in admitted] == [2, 0, 1]


@examples(50)
@given(extras(st.integers(1, 3)), baselines, MODELS, st.integers(1, 4))
def test_the_other_policies_do_not_look_at_the_budget(
    extras: list[Extra], baseline: Baseline, latency: StepLatencyModel, cap: int
) -> None:
    assert list(Off().admit(extras, baseline, latency)) == []
    assert list(Eager().admit(extras, baseline, latency)) == extras
    capped = list(FixedCap(cap).admit(extras, baseline, latency))
    for group in range(3):
        wanted = [extra for extra in extras if extra.group == group]
        assert [extra for extra in capped if extra.group == group] == wanted[: cap - 1]


def test_policies_have_names() -> None:
    options = [f"taper:{order}" for order in Taper.ORDERS if order != "fcfs"]
    for name in ("off", "eager", "taper", *options, "taper:paper", "cap:1", "cap:12"):
        assert policy(name).name == name


@pytest.mark.parametrize(
    "name", ["", "cap", "cap:", "cap:x", "cap:-1", "off:2", "taper:", "taper:x", "TAPER"]
)
def test_an_unknown_policy_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown policy"):
        policy(name)


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        policy("cap:0")


def test_how_many_fit_is_found_by_bisection() -> None:
    class Counting(StepLatencyModel):
        asked = 0

        def rows_seconds(self, rows: int) -> float:
            self.asked += 1
            return super().rows_seconds(rows)

    latency = Counting({1024: 0.010})
    extras = [Extra(number, 0, 1, 1e-5) for number in range(500)]
    latency.asked = 0
    assert len(Taper().admit(extras, Baseline(1, 0.0, 0.010 + 300.5e-5), latency)) == 300
    assert latency.asked <= 10


@pytest.mark.parametrize("admission", [Taper(), Greedy()], ids=lambda admission: admission.name)
def test_what_just_fits_the_bucket_and_the_budget_is_admitted(admission: Taper | Greedy) -> None:
    latency, extra = StepLatencyModel({4: 0.5}), Extra(0, 0, rows=2, seconds=0.25)
    assert [*admission.admit([extra], Baseline(2, 0.25, budget=1.0), latency)] == [extra]
    assert [*admission.admit([extra], Baseline(3, 0.25, budget=9.0), latency)] == []
    assert [*admission.admit([extra], Baseline(2, 0.25, budget=0.99), latency)] == []


def test_the_cheapest_is_the_one_that_adds_the_fewest_seconds_whatever_its_rows() -> None:
    dear, cheap = Extra(0, 0, rows=1, seconds=3.0), Extra(1, 0, rows=2, seconds=1.0)
    assert cheapest_first([dear, cheap]) == [cheap, dear]
    narrow = Extra(2, 0, rows=1, seconds=1.0)
    assert cheapest_first([cheap, narrow]) == [narrow, cheap], "of equal ones, that with the fewest rows"


def test_of_equal_branches_the_papers_loop_takes_the_oldest_requests() -> None:
    extras = [Extra(number, number, 1, 0.001) for number in range(3)]
    admitted = Greedy().admit(extras, Baseline(1, 0.0, 0.0125), StepLatencyModel({8: 0.010}))
    assert [extra.candidate for extra in admitted] == [0, 1]
