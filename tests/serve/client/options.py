"""A value for each option of sampling and of stopping."""

from __future__ import annotations

from typing import Any

SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 3,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.75,
    "frequency_penalty": -0.5,
    "seed": 9,
    "logit_bias": {5: 2.0},
}
STOPPING: dict[str, Any] = {"max_tokens": 4, "stop": ["."], "stop_token_ids": [6], "ignore_eos": True}
