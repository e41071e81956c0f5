"""How a layer's KV pages lie in a TPU's memory: [pages, kv_heads, planes, page_size, 128].

One copy brings a page with all of its heads, and what it brings of a head is whole tiles of 128 lanes. Heads
of up to 64 elements have one plane, keys in its lower 64 lanes and values in the upper ones; larger ones
have a plane of keys and a plane of values. Lanes that a head does not fill hold zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jax import Array

LANES = 128


def planes(head_dim: int) -> int:
    """Planes of a head's keys and values."""
    return 1 if 2 * head_dim <= LANES else 2


def value_lane(head_dim: int) -> int:
    """The lane of its plane at which a head's values begin."""
    return LANES // 2 if planes(head_dim) == 1 else 0


def widened(x: Array, first: int = 0) -> Array:
    """The last axis laid into LANES lanes from lane `first` on; zeros in the others."""
    spare = LANES - first - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(first, spare)])


def joined(k: Array, v: Array) -> Array:
    """Keys and values [..., head_dim] as they lie in pages: [..., planes, 128]."""
    head_dim = k.shape[-1]
    if planes(head_dim) == 1:
        return (widened(k) + widened(v, value_lane(head_dim)))[..., None, :]
    return jnp.stack([widened(k), widened(v)], axis=-2)
