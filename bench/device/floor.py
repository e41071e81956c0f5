"""The byte floor of a step: every weight and every different position of KV, read once."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from model.config import ModelConfig
from model.decoder import Decoder


def weight_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of weights that a step reads whole: the embedding only where it is the head too."""
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    read = sum(leaf.size for leaf in Decoder(config, dtype).split()[1]) - looked_up
    return jnp.dtype(dtype).itemsize * read


def kv_bytes(config: ModelConfig, dtype: Any, tokens: float) -> float:
    """Bytes of the keys and values of so many positions, however they are kept."""
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return tokens * elements * jnp.dtype(dtype).itemsize


def floor_seconds(config: ModelConfig, dtype: Any, kv_tokens: float, copy_tb_s: float) -> float:
    """The least that a step takes that reads so many positions, at the copy rate of a device."""
    return (weight_bytes(config, dtype) + kv_bytes(config, dtype, kv_tokens)) / copy_tb_s / 1e12
