"""The layers of the decoder, and Parameter: an array's shape, axes and scale in one definition.

Modules are built *abstract*: their parameters hold a jax.ShapeDtypeStruct until model/weights.py or
model/checkpoint.py puts arrays in their place, so describing a 32B model costs nothing. Matrices are kept
as [in …, out …], one array each.

Norms, rotary positions and softmax are computed in float32 or wider; matrix products of float32 inputs ask
for the highest precision, because accelerators would otherwise use TF32 or bfloat16.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from attention import Backend, HeadNorms, Pages, Places, Work
from attention.heads import rms_norm, wide
from model.architecture import ARCHITECTURES
from model.config import ModelConfig
from model.peer_memory import reaching
from model.rotary import inverse_frequencies

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

    `fan_in` is how many inputs each output sums: random weights have standard deviation 1/sqrt(fan_in), and
    a bias that of one input. A `fan_in` of 0 marks a norm's scale, which starts at one. The names of its
    tensors in a checkpoint, or of its `parts`, are in model/hf_tensor.py.
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


def rotary_angles(
    config: ModelConfig, positions: Int[Array, " rows"], dtype: Any
) -> tuple[Float[Array, "rows pairs"], Float[Array, "rows pairs"]]:
    """(cos, sin) of every row's position, [rows, head_dim / 2], in at least float32.

    Where a stretched context sharpens attention (YaRN), both are multiplied by its factor.
    """
    scaling = config.rope_scaling
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, scaling)
    frequencies = jnp.asarray(frequencies, wide(dtype))
    angles = positions.astype(frequencies.dtype)[:, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is None or scaling.attention_factor == 1:
        return cos, sin
    return cos * scaling.attention_factor, sin * scaling.attention_factor


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
        architecture = ARCHITECTURES[config.architecture]
        if architecture.qkv_bias:
            self.q_bias = parameter((heads, size), ("heads", "head_dim"), dtype, fan_in=1)
            self.k_bias = parameter((kv_heads, size), ("kv_heads", "head_dim"), dtype, fan_in=1)
            self.v_bias = parameter((kv_heads, size), ("kv_heads", "head_dim"), dtype, fan_in=1)
        self.has_bias = architecture.qkv_bias
        normed = architecture.qk_norm
        self.q_norm = RMSNorm(size, "head_dim", config.rms_norm_eps, dtype) if normed else None
        self.k_norm = RMSNorm(size, "head_dim", config.rms_norm_eps, dtype) if normed else None
        self.scale = size**-0.5

    def project(self, x: Float[Array, "rows embed"]) -> Float[Array, "rows all_heads head_dim"]:
        """The heads of each row: queries, keys, values."""
        if not self.has_bias:
            return jnp.concatenate([product("re,ehd->rhd", x, weight) for weight in self.projections], axis=1)
        # Some biases are far larger than what they are added to: the sum is rounded, and not its parts.
        qkv = [product("re,ehd->rhd", x, weight, out_dtype=wide(x.dtype)) for weight in self.projections]
        biases = [bias[...] for bias in (self.q_bias, self.k_bias, self.v_bias)]
        return (jnp.concatenate(qkv, axis=1) + jnp.concatenate(biases, axis=0)).astype(x.dtype)

    @property
    def projections(self) -> tuple[nnx.Param, nnx.Param, nnx.Param]:
        return self.q, self.k, self.v

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


class DecoderLayer(nnx.Module):
    """The parts of a layer; `decoder_layer` runs them."""

    def __init__(self, config: ModelConfig, dtype: Any):
        self.attention_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype)


class Stream(NamedTuple):
    """The residual stream, and its norm for what comes next."""

    hidden: Float[Array, "rows embed"]
    normed: Float[Array, "rows embed"]


@runtime_checkable
class Products(Protocol):
    """How a layer's products are computed (model/products.py): a value, to which a program is specialised."""

    def heads(self, attention: Attention, x: Float[Array, "rows embed"]) -> Array:
        """The heads of each row as `Backend.write` takes them."""
        ...

    def gated(self, mlp: MLP, x: Float[Array, "rows embed"]) -> Float[Array, "rows mlp"]: ...

    def add(self, stream: Stream, x: Float[Array, "rows ..."], weight: nnx.Param, norm: RMSNorm) -> Stream:
        """The residual stream after the product of x and a weight is added to it, and its next norm."""
        ...


@partial(jax.jit, static_argnames=("backend", "products"))
def decoder_layer(
    layer: DecoderLayer,
    next_norm: RMSNorm,
    stream: Stream,
    pages: Pages,
    rows: Rows,
    reach: Int[Array, "1 4"] | None = None,
    *,
    backend: Backend,
    products: Products,
) -> tuple[Stream, Pages]:
    """A layer's output, normed for the next one, and its KV pages: one jitted function, which a program of
    many layers traces once.

    The layer and the pages are one device's parts; the peers of its products have the others, and add up
    through the memory that `reach` says, if any (model.peer_memory).
    """
    attention, mlp = layer.attention, layer.mlp
    heads = products.heads(attention, stream.normed)
    q, pages = backend.write(heads, attention.norms, rows.angles, pages, rows.places)
    out, _ = backend.attend(q, pages, rows.work, scale=attention.scale)
    with reaching(reach):
        stream = products.add(stream, out, attention.o, layer.mlp_norm)
        return products.add(stream, products.gated(mlp, stream.normed), mlp.down, next_norm), pages
