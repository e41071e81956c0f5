"""Stretched contexts: fast pairs are kept, slow ones stretched, by each scaling's own formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model.rotary import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    inverse_frequencies,
    stated_context,
    stretched_context,
)

LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=8192)
YARN = YarnScaling(factor=4.0, original_max_context=32768, attention_factor=1.1)


def llama3_frequency(frequency: float) -> float:
    """As Meta's apply_scaling has it: by wavelength, in three ranges."""
    wavelength = 2 * math.pi / frequency
    if wavelength < LLAMA3.original_max_context / LLAMA3.high_freq_factor:
        return frequency
    if wavelength > LLAMA3.original_max_context / LLAMA3.low_freq_factor:
        return frequency / LLAMA3.factor
    smooth = LLAMA3.original_max_context / wavelength - LLAMA3.low_freq_factor
    smooth /= LLAMA3.high_freq_factor - LLAMA3.low_freq_factor
    return (1 - smooth) * frequency / LLAMA3.factor + smooth * frequency


def test_llama3_stretches_long_waves_keeps_short_ones_and_goes_over_in_between() -> None:
    plain = inverse_frequencies(128, 5e5, None)
    np.testing.assert_allclose(plain, 5e5 ** -(np.arange(64) / 64), rtol=1e-12)
    scaled = inverse_frequencies(128, 5e5, LLAMA3)
    np.testing.assert_allclose(scaled, [llama3_frequency(f) for f in plain], rtol=1e-12)
    stretched, kept = np.isclose(scaled, plain / 8), np.isclose(scaled, plain)
    assert stretched.any()
    assert kept.any()
    assert (~stretched & ~kept).any()


def test_linear_scaling_stretches_every_pair() -> None:
    plain = inverse_frequencies(64, 1e4, None)
    np.testing.assert_allclose(inverse_frequencies(64, 1e4, LinearScaling(factor=4.0)), plain / 4)


def test_yarn_keeps_what_turns_often_and_stretches_what_turns_less_than_once() -> None:
    plain = inverse_frequencies(128, 1e6, None)
    scaled = inverse_frequencies(128, 1e6, YARN)
    turns = 32768 * plain / (2 * math.pi)
    assert np.array_equal(scaled[turns > 40], plain[turns > 40])
    assert np.allclose(scaled[turns < 0.8], plain[turns < 0.8] / 4)
    between = scaled[(turns < 30) & (turns > 1.3)] / plain[(turns < 30) & (turns > 1.3)]
    assert ((between < 1) & (between > 0.25)).all()
    assert (np.diff(between) < 0).all()


def test_where_every_pair_turns_more_than_once_yarn_stretches_none_wholly() -> None:
    """What bounds the end of the ramp is the head's dimensions, and not its pairs."""
    plain = inverse_frequencies(16, 10.0, None)
    scaling = YarnScaling(factor=4.0, original_max_context=256, attention_factor=1.0)
    low = math.floor(8 * math.log(256 / (32 * 2 * math.pi)) / math.log(10.0))
    high = math.ceil(8 * math.log(256 / (2 * math.pi)) / math.log(10.0))
    assert (low, high) == (0, 13)
    stretched = np.arange(8) / 13
    expected = plain * (1 - stretched) + plain / 4 * stretched
    np.testing.assert_allclose(inverse_frequencies(16, 10.0, scaling), expected, rtol=1e-12)


def test_where_no_pair_turns_often_yarn_keeps_the_first_alone() -> None:
    plain = inverse_frequencies(16, 1e4, None)
    scaling = YarnScaling(factor=4.0, original_max_context=64, attention_factor=1.0)
    assert 64 / (32 * 2 * math.pi) < 1, "the ramp would begin before the first pair"
    stretched = np.minimum(np.arange(8) / 3, 1)
    expected = plain * (1 - stretched) + plain / 4 * stretched
    np.testing.assert_allclose(inverse_frequencies(16, 1e4, scaling), expected, rtol=1e-12)


def test_yarns_bounds_can_be_parts_of_a_pair_and_can_be_one() -> None:
    whole = inverse_frequencies(
        16, 1e4, YarnScaling(factor=4.0, original_max_context=64, attention_factor=1.0)
    )
    parts = inverse_frequencies(
        16, 1e4, YarnScaling(factor=4.0, original_max_context=64, attention_factor=1.0, truncate=False)
    )
    assert not np.allclose(whole, parts)
    step = YarnScaling(
        factor=4.0,
        original_max_context=64,
        attention_factor=1.0,
        beta_fast=2.0,
        beta_slow=2.0,
        truncate=False,
    )
    plain, scaled = inverse_frequencies(16, 1e4, None), inverse_frequencies(16, 1e4, step)
    assert {round(float(ratio), 6) for ratio in scaled / plain} == {1.0, 0.25}


@pytest.mark.parametrize(
    ("scaling", "stated", "context"),
    [
        (None, 100, 100),
        (LLAMA3, 100, 100),
        (LinearScaling(factor=4 / 3), 100, 133),
        (LinearScaling(factor=4 / 3), 101, 134),  # 100.5 of it
        (YARN, 131072, 131072),
    ],
)
def test_the_context_that_a_file_states_can_be_found_again(
    scaling: RopeScaling | None, stated: int, context: int
) -> None:
    assert stretched_context(scaling, stated) == context
    assert stated_context(scaling, context) == stated
