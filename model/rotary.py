"""Rotary positions: how fast each pair of a head's elements turns, and how contexts are stretched.

A checkpoint that reads further than it was trained to says how in `rope_parameters` (or `rope_scaling`) of
its config. The formulas are those of transformers' modeling_rope_utils.py; they are computed here in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """All positions are divided by `factor`."""

    factor: float

    @property
    def attention_factor(self) -> float:
        return 1.0

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        del theta
        return frequencies / self.factor

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": "linear", "factor": self.factor}


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's rotary scaling: long wavelengths are stretched by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_context: int

    @property
    def attention_factor(self) -> float:
        return 1.0

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """As apply_scaling of https://github.com/meta-llama/llama-models has it."""
        del theta
        turns = self.original_max_context * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_context,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): pairs that turn often within the original context are kept, those that turn
    less than once are stretched by `factor`, and cos and sin grow by `attention_factor`.

    beta_fast, beta_slow  turns within the original context from which a pair is kept, below which stretched
    truncate              whether the bounds between them are whole pairs
    """

    factor: float
    original_max_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        pairs = len(frequencies)
        low, high = self._pair(self.beta_fast, pairs, theta), self._pair(self.beta_slow, pairs, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        width = high - low if high != low else 0.001
        stretched = np.clip((np.arange(pairs) - low) / width, 0.0, 1.0)
        return frequencies * (1 - stretched) + frequencies / self.factor * stretched

    def _pair(self, turns: float, pairs: int, theta: float) -> float:
        """The pair, as a real number, that turns so often within the original context."""
        return pairs * math.log(self.original_max_context / (turns * 2 * math.pi)) / math.log(theta)

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_context,
            "attention_factor": self.attention_factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
        }


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """What cos and sin are multiplied by where a checkpoint does not say it outright."""

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each rotary pair, [head_dim / 2], float64."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = theta**-exponents
    return frequencies if scaling is None else scaling.stretch(frequencies, theta)


def stretched_context(scaling: RopeScaling | None, max_positions: int) -> int:
    """The longest context of a checkpoint whose `max_position_embeddings` is `max_positions`, in tokens.

    As vLLM derives it: YaRN stretches its original context and linear scaling the one that is stated, while
    Llama 3's stated context is stretched already.
    """
    match scaling:
        case YarnScaling():
            return int(scaling.original_max_context * scaling.factor)
        case LinearScaling():
            return int(max_positions * scaling.factor)
        case _:
            return max_positions


def stated_context(scaling: RopeScaling | None, max_context: int) -> int:
    """The `max_position_embeddings` that `stretched_context` makes `max_context` of."""
    if isinstance(scaling, LinearScaling):
        return math.ceil(round(max_context / scaling.factor, 6))
    return max_context
