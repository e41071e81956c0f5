"""The default model's own forward pass: plain JAX over whole sequences with a mask. No cache, no pages.

It trains the model and defines what it should say. It works on Hugging Face's tensors by name and shares
no code with what the server runs, so that agreement between the two is evidence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Weights = dict[str, Any]


def sight(
    document: Int[Array, "rows length"], branch: Int[Array, "rows length depths_2"]
) -> Bool[Array, "rows length length"]:
    """Whether token i sees token j: an earlier one, of its own document, and not of a sibling branch."""
    length = document.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool)) & (document[:, :, None] == document[:, None, :])
    for depth in range(0, branch.shape[-1], 2):
        fork, child = branch[..., depth], branch[..., depth + 1]
        same_fork = (fork[:, :, None] == fork[:, None, :]) & (fork[:, :, None] > 0)
        seen &= ~(same_fork & (child[:, :, None] != child[:, None, :]))
    return seen


def _norm(x: Array, scale: Array, eps: float) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def _turn(x: Array, positions: Array, theta: float) -> Array:
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def logits(
    weights: Weights,
    config: ModelConfig,
    tokens: Int[Array, "rows length"],
    positions: Int[Array, "rows length"],
    seen: Bool[Array, "rows length length"],
    dtype: Any = jnp.float32,
) -> Float[Array, "rows length vocab"]:
    """Next-token logits of every token, float32; everything before them in `dtype`."""

    def weight(name: str) -> Array:
        return weights[f"{name}.weight"].astype(dtype)

    def heads(x: Array, name: str, count: int) -> Array:
        return (x @ weight(name).T).reshape(*x.shape[:2], count, config.head_dim)

    eps, group = config.rms_norm_eps, config.num_heads // config.num_kv_heads
    hidden = weight("model.embed_tokens")[tokens]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        x = _norm(hidden, weight(f"{layer}.input_layernorm"), eps)
        q = heads(x, f"{layer}.self_attn.q_proj", config.num_heads)
        k = heads(x, f"{layer}.self_attn.k_proj", config.num_kv_heads)
        v = heads(x, f"{layer}.self_attn.v_proj", config.num_kv_heads)
        q = _turn(_norm(q, weight(f"{layer}.self_attn.q_norm"), eps), positions, config.rope_theta)
        k = _turn(_norm(k, weight(f"{layer}.self_attn.k_norm"), eps), positions, config.rope_theta)
        q = q.reshape(*q.shape[:2], config.num_kv_heads, group, config.head_dim)
        scores = jnp.einsum("bihgd,bjhd->bhgij", q, k) * config.head_dim**-0.5
        scores = jnp.where(seen[:, None, None], scores.astype(jnp.float32), -1e30)
        out = jnp.einsum("bhgij,bjhd->bihgd", jax.nn.softmax(scores, -1).astype(dtype), v)
        hidden += out.reshape(*x.shape[:2], -1) @ weight(f"{layer}.self_attn.o_proj").T
        x = _norm(hidden, weight(f"{layer}.post_attention_layernorm"), eps)
        gate = jax.nn.silu(x @ weight(f"{layer}.mlp.gate_proj").T)
        hidden += (gate * (x @ weight(f"{layer}.mlp.up_proj").T)) @ weight(f"{layer}.mlp.down_proj").T
    last = _norm(hidden, weight("model.norm"), eps)
    return (last @ weight("model.embed_tokens").T).astype(jnp.float32)


def initial_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Normal weights of variance 1 / inputs, less where they add to the residual; norms of one."""
    random = np.random.default_rng(seed)
    hidden, size, inner = config.hidden_size, config.head_dim, config.intermediate_size
    heads, kv_heads = config.num_heads * size, config.num_kv_heads * size

    def normal(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)

    weights = {"model.embed_tokens": normal(config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer, small = f"model.layers.{i}", (2 * config.num_layers) ** -0.5
        weights |= {
            f"{layer}.input_layernorm": np.ones(hidden, np.float32),
            f"{layer}.self_attn.q_proj": normal(heads, hidden),
            f"{layer}.self_attn.k_proj": normal(kv_heads, hidden),
            f"{layer}.self_attn.v_proj": normal(kv_heads, hidden),
            f"{layer}.self_attn.o_proj": normal(hidden, heads, small),
            f"{layer}.self_attn.q_norm": np.ones(size, np.float32),
            f"{layer}.self_attn.k_norm": np.ones(size, np.float32),
            f"{layer}.post_attention_layernorm": np.ones(hidden, np.float32),
            f"{layer}.mlp.gate_proj": normal(inner, hidden),
            f"{layer}.mlp.up_proj": normal(inner, hidden),
            f"{layer}.mlp.down_proj": normal(hidden, inner, small),
        }
    weights["model.norm"] = np.ones(hidden, np.float32)
    return {f"{name}.weight": value for name, value in weights.items()}
