"""Which tokens top-k, top-p and min-p leave to be drawn from.

All three keep what is at or above a threshold, which is found by weighing the tokens above candidates of it,
bits from the top; so nothing is sorted, and a nucleus may hold any number of tokens. Devices that share a
vocabulary weigh their own parts and add them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from model.sharding import ALONE, Peers

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt

# Bits of a threshold that are found at once: with 151,936 tokens and 64 samples two are fastest on an H200,
# and four on two of them, where each digit costs an all-reduce.
DIGIT, SHARED_DIGIT = 2, 4


def keep_nucleus(
    scaled: Float[Array, "samples vocab"],
    top_k: Int[Array, " samples"],
    top_p: Float[Array, " samples"],
    min_p: Float[Array, " samples"],
    peers: Peers,
) -> Float[Array, "samples vocab"]:
    """`scaled` with -inf for what top-k, top-p (of the mass that top-k left) and min-p exclude.

    It is the logits over the temperature, relative to the row's best. A top-k of 0 excludes nothing.
    """
    top_p, min_p = top_p.astype(scaled.dtype), min_p.astype(scaled.dtype)
    keys = _ordered_bits(scaled)
    found = _threshold(keys, jnp.ones_like(scaled), lambda total: top_k.astype(total.dtype), peers)
    at_least = jnp.where(top_k > 0, found, 0)
    mass = jnp.where(keys >= at_least[:, None], jnp.exp(scaled), 0)
    found = _threshold(keys, mass, lambda total: top_p * total, peers)
    at_least = jnp.maximum(at_least, jnp.where(top_p < 1, found, 0))
    kept = (keys >= at_least[:, None]) & (scaled >= jnp.log(min_p)[:, None])
    best = scaled >= 0  # the mass that a tiny top-p asks for may be rounded to nothing
    return jnp.where(kept | best, scaled, -jnp.inf)


def _ordered_bits(values: Float[Array, "samples vocab"]) -> UInt[Array, "samples vocab"]:
    """Unsigned integers in the order of the floats."""
    bits = lax.bitcast_convert_type(values, jnp.uint64 if values.dtype == jnp.float64 else jnp.uint32)
    sign = jnp.array(1, bits.dtype) << (8 * bits.dtype.itemsize - 1)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)


def _threshold(
    keys: UInt[Array, "samples vocab"],
    weight: Float[Array, "samples vocab"],
    target_of: Callable[[Float[Array, " samples"]], Float[Array, " samples"]],
    peers: Peers,
) -> UInt[Array, " samples"]:
    """The greatest t whose keys >= t weigh the target at least; 0 where all of them weigh less.

    The target is a function of what all keys weigh together. The threshold is found from the top, a digit of
    a few bits at a time: for each value that the digit may have, the keys at or above it are weighed, in one
    pass over the row and, between devices, one small all-reduce. A sort takes many times longer.
    """
    bits = DIGIT if peers == ALONE else SHARED_DIGIT
    passes = 8 * keys.dtype.itemsize // bits
    target = target_of(peers.sum(jnp.sum(weight, axis=1)))[:, None]

    def add_digit(i: Array | int, found: Array) -> Array:
        digits = jnp.arange(1 << bits, dtype=keys.dtype) << jnp.array(bits * (passes - 1 - i), keys.dtype)
        reached = keys[:, :, None] >= (found[:, None] | digits[1:])[:, None, :]
        weights = peers.sum(jnp.sum(jnp.where(reached, weight[:, :, None], 0), axis=1))
        # They fall with the digit.
        return found | digits[jnp.sum(weights >= target, axis=1, dtype=jnp.int32)]

    found = jnp.zeros(keys.shape[:1], keys.dtype)
    if peers == ALONE:
        return lax.fori_loop(0, passes, add_digit, found)
    for i in range(passes):  # a loop on the device that held a collective would be dear
        found = add_digit(i, found)
    return found
