"""The byte floor of a step: every weight and every different position of KV, read once.

Devices that share a model read their parts at the same time: what counts is the bytes of one of them.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from model.config import ModelConfig
from model.decoder import Decoder
from model.sharding import ON_ONE_DEVICE, Placement
from model.weights import parameters


def weight_bytes(config: ModelConfig, dtype: Any, placement: Placement = ON_ONE_DEVICE) -> int:
    """Bytes of weights that one device reads in a step: the embedding only where it is the head too."""
    model = Decoder(config, dtype)
    read = sum(
        param.get_value().size // math.prod(map(placement.parts, param.get_metadata("axes")))
        for path, param in parameters(model)
        if config.tie_embeddings or path != ("embedding",)
    )
    return jnp.dtype(dtype).itemsize * read


def kv_bytes(config: ModelConfig, dtype: Any, tokens: float, placement: Placement = ON_ONE_DEVICE) -> float:
    """Bytes of one device's keys and values of so many positions, however they are kept."""
    kv_heads = config.num_kv_heads // placement.parts("kv_heads")
    elements = 2 * config.num_layers * kv_heads * config.head_dim
    return tokens * elements * jnp.dtype(dtype).itemsize


def floor_seconds(
    config: ModelConfig,
    dtype: Any,
    kv_tokens: float,
    copy_tb_s: float,
    placement: Placement = ON_ONE_DEVICE,
) -> float:
    """The least that a step takes that reads so many positions, at the copy rate of a device."""
    read = weight_bytes(config, dtype, placement) + kv_bytes(config, dtype, kv_tokens, placement)
    return read / copy_tb_s / 1e12
