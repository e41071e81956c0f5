"""Queries, keys and values on their way into attention: norm of each head, rotary position, KV write.

`write` is the plain form, which is the oracle of what a backend does in one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int32


class HeadNorms(NamedTuple):
    """RMS norms of query and key heads: their scales, and what is added to the mean square."""

    q_scale: Float[Any, " head_dim"]
    k_scale: Float[Any, " head_dim"]
    eps: float


class Places(NamedTuple):
    """Where each row's key and value go. A page that is not in the pool writes nowhere."""

    page: Int32[Any, " rows"]
    offset: Int32[Any, " rows"]


def group_size(heads: int, kv_heads: int) -> int:
    """Query heads of each KV head. Raises ValueError if they cannot be shared out evenly."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    return heads // kv_heads


def wide(dtype: Any) -> Any:
    """The dtype of sums and exponentials: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: Float[Array, "*batch size"], scale: Float[Array, " size"], eps: float) -> Array:
    """Root mean square norm (arXiv 1910.07467), computed in float32 or wider."""
    y = x.astype(wide(x.dtype))
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(y.dtype)).astype(x.dtype)


def rotate(
    x: Float[Array, "rows heads head_dim"], cos: Float[Array, "rows pairs"], sin: Float[Array, "rows pairs"]
) -> Float[Array, "rows heads head_dim"]:
    """Rotary positions in the Hugging Face layout: pair i is elements i and i + head_dim / 2."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def write(
    qkv: Float[Array, "rows all_heads head_dim"],
    norms: HeadNorms | None,
    angles: tuple[Array, Array],
    pages: tuple[Array, Array],
    places: Places,
) -> tuple[Array, tuple[Array, Array]]:
    """`attention.backend.Backend.write` to pages of keys and of values, [pages, kv_heads, page, head_dim]."""
    k_pages, v_pages = pages
    heads, kv_heads = qkv.shape[1] - 2 * k_pages.shape[1], k_pages.shape[1]
    q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
    if norms is not None:
        q, k = rms_norm(q, norms.q_scale, norms.eps), rms_norm(k, norms.k_scale, norms.eps)
    q, k = rotate(q, *angles), rotate(k, *angles)
    page, offset = places
    k_pages = k_pages.at[page, :, offset].set(k.astype(k_pages.dtype), mode="drop")
    v_pages = v_pages.at[page, :, offset].set(v.astype(v_pages.dtype), mode="drop")
    return q, (k_pages, v_pages)
