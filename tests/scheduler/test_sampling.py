"""Sampling options are described once: what is off changes nothing, and can be asked for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from scheduler.sampling import OPTIONS, SamplingParams, faults_of_sampling

GREEDY = SamplingParams()


def test_numbers_are_off_by_default_and_their_ranges_hold_what_is_off() -> None:
    assert [option.name for option in OPTIONS] == [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ]
    for option in OPTIONS:
        assert getattr(GREEDY, option.name) == option.off
        assert option.low <= option.off <= option.high


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_a_penalty_makes_the_choice_depend_on_what_came_before(option) -> None:
    assert replace(GREEDY, **{option.name: option.off + 1}).uses_penalties == ("penalty" in option.name)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_out_of_its_range_is_named(option) -> None:
    assert list(faults_of_sampling(replace(GREEDY, **{option.name: option.off}), 10)) == []
    for value in (option.low - 1, option.high + 1, math.nan, math.inf):
        (fault,) = faults_of_sampling(replace(GREEDY, **{option.name: value}), 10)
        assert fault.startswith(f"{option.name}: ")


def test_a_bias_is_finite_and_of_a_token_in_the_vocabulary() -> None:
    assert list(faults_of_sampling(replace(GREEDY, logit_bias=((0, -100.0), (9, 100.0))), 10)) == []
    for bias in ((10, 1.0), (-1, 1.0), (0, 100.5), (0, math.nan), (0, -math.inf)):
        (fault,) = faults_of_sampling(replace(GREEDY, logit_bias=(bias,)), 10)
        assert fault.startswith(f"logit_bias[{bias[0]}]: ")
