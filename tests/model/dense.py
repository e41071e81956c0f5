"""The dense oracle: a whole sequence at once in NumPy, with any mask and any positions. No cache, no pages.

It reads a checkpoint's own tensors (Hugging Face names and layout) and shares no code with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.architecture import ARCHITECTURES
from model.config import ModelConfig
from model.rotary import LinearScaling, Llama3Scaling, YarnScaling


def dense_logits(
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig,
    tokens: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray | None = None,
    mask: np.ndarray | None = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """Logits [n, vocab] of `tokens` [n], the i-th of which sees the j-th where `mask[i, j]`.

    Positions default to 0..n-1 and the mask to the causal one. `tensors` is a checkpoint under Hugging
    Face's names: what `model.weights.hf_tensors` or a safetensors file gives.
    """
    n = len(tokens)
    positions = np.arange(n) if positions is None else np.asarray(positions)
    mask = np.tril(np.ones((n, n), bool)) if mask is None else mask
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim

    def weight(name: str) -> np.ndarray:
        return tensors[f"{name}.weight"].astype(dtype)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight(name)

    def projected(x: np.ndarray, name: str, heads: int) -> np.ndarray:
        y = x @ weight(name).T
        if ARCHITECTURES[config.architecture].qkv_bias:
            y = y + tensors[f"{name}.bias"].astype(dtype)
        return y.reshape(n, heads, size)

    turn = np.exp(1j * positions[:, None] * _radians_per_position(config))[:, None, :]
    turn = turn * _attention_factor(config)

    def rotate(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1).astype(dtype)

    hidden = weight("model.embed_tokens")[np.asarray(tokens)]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        x = norm(hidden, f"{layer}.input_layernorm")
        q = projected(x, f"{layer}.self_attn.q_proj", heads)
        k = projected(x, f"{layer}.self_attn.k_proj", kv_heads)
        v = projected(x, f"{layer}.self_attn.v_proj", kv_heads)
        if ARCHITECTURES[config.architecture].qk_norm:
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size)
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hij,jhd->ihd", weights, v).reshape(n, heads * size)
        hidden = hidden + out @ weight(f"{layer}.self_attn.o_proj").T

        x = norm(hidden, f"{layer}.post_attention_layernorm")
        gate = x @ weight(f"{layer}.mlp.gate_proj").T
        up = x @ weight(f"{layer}.mlp.up_proj").T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{layer}.mlp.down_proj").T

    head = weight("model.embed_tokens" if config.tie_embeddings else "lm_head")
    return norm(hidden, "model.norm") @ head.T


def dense_greedy(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, prompt: Sequence[int], count: int
) -> list[int]:
    """The greedy continuation of a prompt, everything recomputed for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(dense_logits(tensors, config, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def _radians_per_position(config: ModelConfig) -> np.ndarray:
    """Pair by pair, as the papers put it: by wavelengths, and by turns within the original context."""
    return np.array([_radians(config, pair) for pair in range(config.head_dim // 2)])


def _radians(config: ModelConfig, pair: int) -> float:
    theta = config.rope_theta ** -(2 * pair / config.head_dim)
    match config.rope_scaling:
        case None:
            return theta
        case LinearScaling() as scaling:
            return theta / scaling.factor
        case Llama3Scaling() as scaling:
            wavelength = 2 * math.pi / theta
            if wavelength > scaling.original_max_context / scaling.low_freq_factor:
                return theta / scaling.factor
            if wavelength < scaling.original_max_context / scaling.high_freq_factor:
                return theta
            smooth = (scaling.original_max_context / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            return (1 - smooth) * theta / scaling.factor + smooth * theta
        case YarnScaling() as scaling:
            first, last = (
                config.head_dim
                * math.log(scaling.original_max_context / (2 * math.pi * turns))
                / (2 * math.log(config.rope_theta))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, config.head_dim - 1)
            ramp = min(max((pair - first) / (last - first or 0.001), 0), 1)
            return (1 - ramp) * theta + ramp * theta / scaling.factor


def _attention_factor(config: ModelConfig) -> float:
    scaling = config.rope_scaling
    return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
