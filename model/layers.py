"""The layers of the decoder, and Parameter: an array's shape, axes and scale in one definition.

Modules are built *abstract*: their parameters hold a jax.ShapeDtypeStruct until model/weights.py or
model/checkpoint.py puts arrays in their place, so describing a 32B model costs nothing. Matrices are kept
as [in …, out …], one array each.

Norms, rotary positions and softmax are computed in float32 or wider; matrix products of float32 inputs ask
for the highest precision, because accelerators would otherwise use TF32 or bfloat16.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention import Backend, HeadNorms, Pages, Places, Work
from attention.heads import rms_norm, wide
from model.architecture import ARCHITECTURES
from model.config import Llama3Scaling, ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Parts(NamedTuple):
    """A parameter that checkpoints store in several tensors: they lie side by side along `axis`."""

    axis: int
    sizes: tuple[int, ...]


def parameter(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: Any,
    *,
    fan_in: int,
    parts: Parts | None = None,
) -> nnx.Param:
    """A parameter without a value yet: its shape, logical axes and dtype.

    `fan_in` is how many inputs each output sums: random weights have standard deviation 1/sqrt(fan_in).
    A `fan_in` of 0 marks a norm's scale, which starts at one. The names of its tensors in a checkpoint, or
    of its `parts`, are in model/hf_tensor.py.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and axes {axes} differ in length")
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, fan_in=fan_in, parts=parts)


def product(spec: str, x: Array, weight: nnx.Param, *, out_dtype: Any = None) -> Array:
    """An einsum of activations and a weight, accumulated in at least float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, weight[...], precision=precision, preferred_element_type=out_dtype or x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, axis: str, eps: float, dtype: Any):
        self.scale = parameter((size,), (axis,), dtype, fan_in=0)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        return rms_norm(x, self.scale[...], self.eps)


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each rotary pair, [head_dim / 2], float64."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config.rope_scaling)
    return frequencies


def _stretch(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    # https://github.com/meta-llama/llama-models: apply_scaling; between the two bounds, interpolate.
    turns = scaling.original_max_context * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_angles(
    config: ModelConfig, positions: Int[Array, " rows"], dtype: Any
) -> tuple[Float[Array, "rows pairs"], Float[Array, "rows pairs"]]:
    """(cos, sin) of every row's position, [rows, head_dim / 2], in at least float32."""
    frequencies = jnp.asarray(inverse_frequencies(config), wide(dtype))
    angles = positions.astype(frequencies.dtype)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


class Rows(NamedTuple):
    """What every layer is told about a step's rows: (cos, sin) of their positions, the places that their keys
    and values go to, and what they read."""

    angles: tuple[Float[Array, "rows pairs"], Float[Array, "rows pairs"]]
    places: Places
    work: Work


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: Any):
        embed, heads, kv_heads, size = (
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.q = parameter((embed, heads, size), ("embed", "heads", "head_dim"), dtype, fan_in=embed)
        self.k = parameter((embed, kv_heads, size), ("embed", "kv_heads", "head_dim"), dtype, fan_in=embed)
        self.v = parameter((embed, kv_heads, size), ("embed", "kv_heads", "head_dim"), dtype, fan_in=embed)
        self.o = parameter((heads, size, embed), ("heads", "head_dim", "embed"), dtype, fan_in=heads * size)
        normed = ARCHITECTURES[config.architecture].qk_norm
        self.q_norm = RMSNorm(size, "head_dim", config.rms_norm_eps, dtype) if normed else None
        self.k_norm = RMSNorm(size, "head_dim", config.rms_norm_eps, dtype) if normed else None
        self.scale = size**-0.5

    def __call__(
        self,
        x: Float[Array, "rows embed"],
        pages: Pages,
        rows: Rows,
        backend: Backend,
    ) -> tuple[Float[Array, "rows embed"], Pages]:
        qkv = jnp.concatenate(
            [product("re,ehd->rhd", x, heads) for heads in (self.q, self.k, self.v)], axis=1
        )
        q, pages = backend.write(qkv, self.norms, rows.angles, pages, rows.places)
        out, _ = backend.attend(q, pages, rows.work, scale=self.scale)
        return product("rhd,hde->re", out, self.o), pages

    @property
    def norms(self) -> HeadNorms | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.scale[...], self.k_norm.scale[...], self.q_norm.eps)


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: Any):
        embed, mlp = config.hidden_size, config.intermediate_size
        self.gate = parameter((embed, mlp), ("embed", "mlp"), dtype, fan_in=embed)
        self.up = parameter((embed, mlp), ("embed", "mlp"), dtype, fan_in=embed)
        self.down = parameter((mlp, embed), ("mlp", "embed"), dtype, fan_in=mlp)

    def __call__(self, x: Float[Array, "rows embed"]) -> Float[Array, "rows embed"]:
        gate = jax.nn.silu(product("re,em->rm", x, self.gate))
        return product("rm,me->re", gate * product("re,em->rm", x, self.up), self.down)


class DecoderLayer(nnx.Module):
    """The parts of a layer; `decoder_layer` runs them."""

    def __init__(self, config: ModelConfig, dtype: Any):
        self.attention_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype)


@partial(jax.jit, static_argnames="backend")
def decoder_layer(
    layer: DecoderLayer,
    hidden: Float[Array, "rows embed"],
    pages: Pages,
    rows: Rows,
    *,
    backend: Backend,
) -> tuple[Float[Array, "rows embed"], Pages]:
    """A layer's output and its KV pages: one jitted function, which a program of many layers traces once."""
    out, pages = layer.attention(layer.attention_norm(hidden), pages, rows, backend)
    hidden = hidden + out
    return hidden + layer.mlp(layer.mlp_norm(hidden)), pages
