"""How a layer's products are computed, and what stands between them: by XLA, or streamed by kernels.

Both are values that a compiled step is specialised to; `products_for` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attention import Backend
from model import streamed
from model.layers import MLP, Attention, Products, RMSNorm, Stream, product
from model.sharding import ALONE, Peers

if TYPE_CHECKING:
    from flax import nnx
    from jaxtyping import Array, Float

    from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Plain:
    """XLA's own; `peers` have the other parts of the weights."""

    peers: Peers = ALONE

    def heads(self, attention: Attention, x: Float[Array, "rows embed"]) -> Array:
        return attention.project(x)

    def gated(self, mlp: MLP, x: Float[Array, "rows embed"]) -> Float[Array, "rows mlp"]:
        return jax.nn.silu(product("re,em->rm", x, mlp.gate)) * product("re,em->rm", x, mlp.up)

    def add(self, stream: Stream, x: Float[Array, "rows ..."], weight: nnx.Param, norm: RMSNorm) -> Stream:
        hidden = stream.hidden + self.peers.quick_sum(_onto_the_stream(x, weight))
        return Stream(hidden, norm(hidden))


@dataclass(frozen=True, slots=True)
class Streamed:
    """The kernels of `model.streamed`, for steps of few rows.

    What `peers` add up comes from XLA: its product has one sum, where the kernel's leaves several.
    """

    interpret: bool
    peers: Peers = ALONE

    def heads(self, attention: Attention, x: Float[Array, "rows embed"]) -> Array:
        if attention.has_bias:
            return attention.project(x)
        weights = [weight[...].reshape(len(weight[...]), -1) for weight in attention.projections]
        sums = streamed.partial_sums(x, weights, interpret=self.interpret)
        return sums.reshape(*sums.shape[:2], -1, attention.q[...].shape[-1])

    def gated(self, mlp: MLP, x: Float[Array, "rows embed"]) -> Float[Array, "rows mlp"]:
        if len(x) > streamed.MOST_GATED:
            return Plain().gated(mlp, x)
        return streamed.gated(x, mlp.gate[...], mlp.up[...], interpret=self.interpret)

    def add(self, stream: Stream, x: Float[Array, "rows ..."], weight: nnx.Param, norm: RMSNorm) -> Stream:
        if self.peers == ALONE:
            matrix = weight[...].reshape(-1, weight[...].shape[-1])
            sums = streamed.partial_sums(x.reshape(len(x), -1), [matrix], interpret=self.interpret)
        else:
            sums = self.peers.quick_sum(_onto_the_stream(x, weight))[None]
        scale = norm.scale[...]
        added = streamed.add_and_norm(sums, stream.hidden, scale, norm.eps, interpret=self.interpret)
        return Stream(*added)


def _onto_the_stream(x: Float[Array, "rows ..."], weight: nnx.Param) -> Float[Array, "rows embed"]:
    """The product of attention's output, or of the MLP's, by XLA."""
    return product("rhd,hde->re" if x.ndim == 3 else "rm,me->re", x, weight)


def products_for(config: ModelConfig, backend: Backend, peers: Peers, rows: int, dtype: Any) -> Products:
    """The faster ones of those that can compute a step of so many rows, on each of the peers."""
    embed, mlp = config.hidden_size, config.intermediate_size // peers.count
    heads, kv_heads = (max(1, count // peers.count) for count in (config.num_heads, config.num_kv_heads))
    inputs, kv = heads * config.head_dim, kv_heads * config.head_dim
    shapes = (embed, inputs), (embed, kv), (inputs, embed), (embed, mlp), (mlp, embed)
    streams = (
        backend.triton is not None
        and rows <= streamed.MOST_ROWS
        and jnp.dtype(dtype).itemsize == 2
        and all(streamed.divides(*shape) for shape in shapes)
    )
    return Streamed(backend.triton == "interpreted", peers) if streams else Plain(peers)
