"""The noise that a sample's token is drawn with."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np


def noise(seed: int, branch: int, position: int, vocab: int) -> np.ndarray:
    """Gumbel noise of a request's seed, a branch's key and a token's position. [vocab] of float32"""
    words = np.array([seed >> 32, seed % 2**32], np.uint32)
    return np.asarray(_noise(words, np.uint32(branch % 2**32), np.int32(position), vocab))


@partial(jax.jit, static_argnames="vocab")
def _noise(words: Any, branch: Any, position: Any, vocab: int) -> jax.Array:
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, branch), position)
    return jax.random.gumbel(key, (vocab,), np.float32)
