from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy import Baseline, Eager, Extra, FixedCap, Off, Taper, policy
from scheduler.predictor import StepLatencyModel
from tests.scheduler.strategies import examples

latencies = st.builds(
    StepLatencyModel,
    st.dictionaries(st.integers(1, 12), st.floats(0.001, 0.02), min_size=1).map(lambda d: d | {12: 0.02}),
    st.floats(0, 1e-3),
)


@st.composite
def extras(draw: st.DrawFn, rows: st.SearchStrategy[int], most: int = 7) -> list[Extra]:
    costs = draw(st.lists(st.tuples(rows, st.integers(1, 60)), max_size=most))
    requests = draw(st.lists(st.sampled_from("abc"), min_size=len(costs), max_size=len(costs)))
    return [
        Extra((request, number), rows, kv_tokens)
        for number, (request, (rows, kv_tokens)) in enumerate(zip(sorted(requests), costs, strict=True))
    ]


@st.composite
def baselines(draw: st.DrawFn) -> Baseline:
    return Baseline(draw(st.integers(1, 8)), draw(st.integers(1, 100)), draw(st.floats(0.001, 0.1)))


def cost(chosen: list[Extra], baseline: Baseline, latency: StepLatencyModel) -> float:
    rows = baseline.rows + sum(extra.rows for extra in chosen)
    return latency.predict(rows, baseline.kv_tokens + sum(extra.kv_tokens for extra in chosen))


def fits(chosen: list[Extra], baseline: Baseline, latency: StepLatencyModel) -> bool:
    rows = baseline.rows + sum(extra.rows for extra in chosen)
    return rows <= latency.buckets.largest and cost(chosen, baseline, latency) <= baseline.budget


@examples(150)
@given(extras(st.just(1)), baselines(), latencies)
def test_taper_admits_as_many_one_row_extras_as_any_choice_could(
    extras: list[Extra], baseline: Baseline, latency: StepLatencyModel
) -> None:
    admitted = list(Taper().admit(extras, baseline, latency))
    best = max(
        (
            count
            for count in range(len(extras) + 1)
            for chosen in combinations(extras, count)
            if not chosen or fits(list(chosen), baseline, latency)
        ),
    )
    assert len(admitted) == best
    assert not admitted or fits(admitted, baseline, latency)


@examples(100)
@given(extras(st.integers(1, 4)), baselines(), latencies)
def test_taper_never_exceeds_the_budget(
    extras: list[Extra], baseline: Baseline, latency: StepLatencyModel
) -> None:
    admitted = list(Taper().admit(extras, baseline, latency))
    assert len(set(admitted)) == len(admitted)
    assert not admitted or fits(admitted, baseline, latency)


@examples(100)
@given(extras(st.just(1), most=12), baselines(), latencies, st.floats(0, 0.1))
def test_more_slack_never_admits_less(
    extras: list[Extra], baseline: Baseline, latency: StepLatencyModel, more: float
) -> None:
    richer = Baseline(baseline.rows, baseline.kv_tokens, baseline.budget + more)
    few, many = Taper().admit(extras, baseline, latency), Taper().admit(extras, richer, latency)
    assert len(few) <= len(many)


@examples(50)
@given(extras(st.just(1), most=12), latencies)
def test_taper_without_a_limit_fills_the_largest_bucket(
    extras: list[Extra], latency: StepLatencyModel
) -> None:
    baseline = Baseline(2, 10, float("inf"))
    assert len(Taper().admit(extras, baseline, latency)) == min(len(extras), latency.buckets.largest - 2)


def test_taper_fills_a_bucket_that_is_paid_for() -> None:
    latency = StepLatencyModel({4: 0.010, 8: 0.020}, 0.0)
    extras = [Extra(("a", number), 1, 5) for number in range(6)]
    assert len(Taper().admit(extras, Baseline(2, 0, 0.010), latency)) == 2
    assert len(Taper().admit(extras, Baseline(2, 0, 0.019), latency)) == 2
    assert len(Taper().admit(extras, Baseline(2, 0, 0.020), latency)) == 6


def test_taper_prefers_branches_that_read_little() -> None:
    latency = StepLatencyModel({8: 0.010}, 1e-4)
    long, short = Extra(("a", 1), 1, 100), Extra(("b", 1), 1, 1)
    assert list(Taper().admit([long, short], Baseline(1, 0, 0.0115), latency)) == [short]


@examples(50)
@given(extras(st.integers(1, 3)), baselines(), latencies, st.integers(1, 4))
def test_the_other_policies_do_not_look_at_the_budget(
    extras: list[Extra], baseline: Baseline, latency: StepLatencyModel, cap: int
) -> None:
    assert list(Off().admit(extras, baseline, latency)) == []
    assert list(Eager().admit(extras, baseline, latency)) == extras
    capped = list(FixedCap(cap).admit(extras, baseline, latency))
    for request in "abc":
        wanted = [extra for extra in extras if extra.key[0] == request]
        assert [extra for extra in capped if extra.key[0] == request] == wanted[: cap - 1]


def test_policies_have_names() -> None:
    for name in ("off", "eager", "taper", "cap:1", "cap:12"):
        assert policy(name).name == name


@pytest.mark.parametrize("name", ["", "cap", "cap:", "cap:x", "cap:-1", "off:2", "TAPER"])
def test_an_unknown_policy_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown policy"):
        policy(name)


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        policy("cap:0")
