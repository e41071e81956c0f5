"""Sampling options are described once: what is off changes nothing, and can be asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.sampling import OPTIONS, SamplingParams

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
