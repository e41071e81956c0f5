"""Models to divide over the eight devices that a test run's CPU counts as."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from model.config import ModelConfig
from model.decoder import Decoder
from model.sharding import Placement
from model.weights import random_weights

# (KV heads, devices)
MESHES = [(kv_heads, count) for kv_heads in (1, 2, 4, 8) for count in (2, 4, 8)]


def meshes(*daily: tuple[int, int]) -> list[Any]:
    """Parameters of a test, of which those in `daily` are not marked as belonging to the full matrix."""
    return [pytest.param(*mesh, marks=() if mesh in daily else pytest.mark.full) for mesh in MESHES]


def divisible(kv_heads: int, *, vocab_size: int = 136, num_layers: int = 2) -> ModelConfig:
    """A model of eight heads that eight devices can share."""
    return ModelConfig(
        name="divisible",
        vocab_size=vocab_size,
        hidden_size=64,
        num_layers=num_layers,
        num_heads=8,
        num_kv_heads=kv_heads,
        head_dim=16,
        intermediate_size=128,
        rope_theta=1e6,
        tie_embeddings=kv_heads == 2,
        max_context=512,
    )


def over(
    config: ModelConfig, count: int, dtype: Any = jnp.float64, seed: int = 1
) -> tuple[Placement, Decoder]:
    """Where `count` devices have the model, and a random one that lies there."""
    placement = Placement.over(config, count)
    with jax.enable_x64(jnp.dtype(dtype) == jnp.float64):
        return placement, random_weights(Decoder(config, dtype), 1, placement)
