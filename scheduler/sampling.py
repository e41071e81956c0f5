"""How the next token is drawn: every sampling option, described once.

An option that is a number is a field of `SamplingParams` made by `option`, and everybody else reads it from
`OPTIONS`: the reader of requests its range, the device's slots their columns, `taper-decode` its flag.
"""

from __future__ import annotations

import math
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
