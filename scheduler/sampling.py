"""How the next token is drawn: every sampling option, described once.

An option that is a number is a field of `SamplingParams` made by `option`, and everybody else reads it from
`OPTIONS`: the reader of requests its range, the device's slots their columns, `taper-decode` its flag.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


def option(off: _Number, low: float, high: float) -> _Number:
    """A field of `SamplingParams` that is a number: see `Option`."""
    return field(default=off, metadata={"option": (off, low, high)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn; the defaults are greedy. Ranges are checked where requests enter."""

    temperature: float = option(0.0, 0, 100)
    """0 is greedy."""
    top_k: int = option(0, 0, math.inf)
    """Draw from the likeliest tokens only; 0 is off."""
    top_p: float = option(1.0, 0, 1)
    """Draw from the likeliest tokens that have this much probability together."""
    min_p: float = option(0.0, 0, 1)
    """Draw from the tokens that are at least this likely, relative to the likeliest."""
    repetition_penalty: float = option(1.0, 0.01, 100)
    """More than 1 makes the tokens of the prompt and of the answer less likely; 1 is off."""
    presence_penalty: float = option(0.0, -2, 2)
    """Taken from the logits of tokens that the answer has; 0 is off."""
    frequency_penalty: float = option(0.0, -2, 2)
    """Taken from a token's logit for each time that the answer has it; 0 is off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each with what is added to its logit."""
    seed: int = 0
    """Same seed, same tokens."""
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def uses_penalties(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Option:
    """A number among the sampling options.

    off        the value that changes nothing, and the default; an int where the option takes whole numbers
    low, high  the least and the greatest value that a client may ask for
    """

    name: str
    off: int | float
    low: float
    high: float


OPTIONS = tuple(
    Option(described.name, *described.metadata["option"])
    for described in fields(SamplingParams)
    if "option" in described.metadata
)
MOST_BIAS = 100.0  # to either side: it bans a token in practice, and cannot leave nothing to draw
LEAST_TEMPERATURE = 0.01  # above 0, which is greedy
_ROUNDING = 1e-6  # a float32 0.01 is a little less than 0.01


def faults_of_sampling(sampling: SamplingParams, vocab_size: int) -> Iterator[str]:
    """What is wrong with the options, each by its name."""
    for option in OPTIONS:
        if fault := fault_of_option(option, getattr(sampling, option.name)):
            yield f"{option.name}: {fault}"
    for token, bias in sampling.logit_bias:
        if fault := fault_of_bias(token, bias, vocab_size):
            yield f"logit_bias[{token}]: {fault}"
    if not 0 <= sampling.seed < 2**64:
        yield f"seed: a seed has 64 bits: 0 to {2**64 - 1} are possible, got {sampling.seed}"


def fault_of_option(option: Option, value: float) -> str | None:
    """Why the option cannot have this value; None if it can."""
    if fault := fault_of_number(value, option.low, option.high):
        return fault
    if option.name == "temperature" and 0 < value < LEAST_TEMPERATURE - _ROUNDING:
        return f"0 (greedy) or {LEAST_TEMPERATURE:g} to {option.high:g} are possible, got {value:g}"
    if option.name == "top_p" and value == 0:
        return "must be more than 0"
    return None


def fault_of_number(value: float, low: float, high: float) -> str | None:
    """Why a number is not in [low, high], whose bounds float32 may round; None if it is. NaN never is."""
    below, above = low - _ROUNDING * abs(low), high + _ROUNDING * abs(high)
    if math.isfinite(value) and below <= value <= above:
        return None
    possible = f"{low:g} to {high:g} are" if math.isfinite(high) else f"{low:g} or more is"
    return f"{possible} possible, got {value:g}"


def fault_of_bias(token: int, bias: float, vocab_size: int) -> str | None:
    """Why the logit of a token cannot have this bias, in a vocabulary of this size; None if it can."""
    if not 0 <= token < vocab_size:
        return f"the id is not less than {vocab_size}, the vocabulary"
    if not -MOST_BIAS <= bias <= MOST_BIAS:
        return f"{-MOST_BIAS:g} to {MOST_BIAS:g} are possible, got {bias:g}"
    return None
