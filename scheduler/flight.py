"""A step that has been launched and whose results have not come back."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.live_request import LiveRequest
from scheduler.step import Forecast, Step


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step, what was expected of it, and when it should end.

    sampling  the requests that it should give a token
    widths    for each request in it, how many branches advance, and how many were ready
    prompt_rows  tokens of prompts that it reads; all_read, whether it reads the last of them
    """

    step: Step
    forecast: Forecast
    end: float
    sampling: set[LiveRequest]
    widths: dict[LiveRequest, tuple[int, int]]
    prompt_rows: int = 0
    all_read: bool = False
