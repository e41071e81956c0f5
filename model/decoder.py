"""Decoder: a dense decoder of any family in model/architecture.py, over a paged KV cache.

NNX describes the model; what runs is the model split once (`Decoder.split`) into its structure, which is
static, and a flat tuple of arrays, which every compiled program takes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from attention import Backend, Places, Work
from attention.heads import wide
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.layers import DecoderLayer, RMSNorm, Rows, Stream, decoder_layer, parameter, product, rotary_angles
from model.peer_memory import reached
from model.products import products_for
from model.sharding import ALONE, ON_ONE_DEVICE, Peers, Placement, own_ids

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Decoder(nnx.Module):
    """Built without values; model/weights.py and model/checkpoint.py fill it in."""

    def __init__(self, config: ModelConfig, dtype: Any):
        vocab, embed = config.vocab_size, config.hidden_size
        self.config = config
        self.embedding = parameter((vocab, embed), ("vocab", "embed"), dtype, fan_in=embed)
        self.layers = nnx.List([DecoderLayer(config, dtype) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(embed, "embed", config.rms_norm_eps, dtype)
        self.head = (
            None
            if config.tie_embeddings
            else parameter((embed, vocab), ("embed", "vocab"), dtype, fan_in=embed)
        )

    @property
    def dtype(self) -> Any:
        return self.embedding.get_value().dtype

    def forward(
        self,
        tokens: Int[Array, " rows"],
        positions: Int[Array, " rows"],
        cache: KVCache,
        write_page: Int[Array, " rows"],
        write_offset: Int[Array, " rows"],
        work: Work,
        backend: Backend,
        placement: Placement = ON_ONE_DEVICE,
    ) -> tuple[Float[Array, "rows embed"], KVCache]:
        """One step over packed rows: writes each row's KV at (write_page, write_offset), then reads `work`.

        Returns the residual stream before the final norm (see `logits`) and the updated cache. A row whose
        write_page is no page writes nowhere; a row to which `work` gives nothing attends to nothing.
        Over a mesh, inside `placement.program`, the model and the cache are one device's parts of them.
        """
        hidden = embed(self.embedding[...], tokens, placement.vocab_peers)
        angles = rotary_angles(self.config, positions, hidden.dtype)
        rows = Rows(angles, Places(write_page, write_offset), work)
        products = products_for(self.config, backend, placement.peers, len(tokens), hidden.dtype)
        norms = [layer.attention_norm for layer in self.layers] + [self.final_norm]
        stream, layers = Stream(hidden, norms[0](hidden)), []
        for layer, next_norm, pages in zip(self.layers, norms[1:], cache.layers, strict=True):
            stream, pages = decoder_layer(
                layer, next_norm, stream, pages, rows, reached(), backend=backend, products=products
            )
            layers.append(pages)
        return stream.hidden, KVCache(tuple(layers))

    def logits(self, hidden: Float[Array, "n embed"]) -> Float[Array, "n vocab"]:
        """Final norm and head, in float32 or wider: of a device's own part of the vocabulary."""
        hidden = self.final_norm(hidden)
        out_dtype = wide(hidden.dtype)
        if self.head is None:
            return product("ne,ve->nv", hidden, self.embedding, out_dtype=out_dtype)
        return product("ne,ev->nv", hidden, self.head, out_dtype=out_dtype)

    def split(self) -> tuple[ModelStructure, tuple[Any, ...]]:
        """The model as (static structure, flat tuple of its arrays, or of their shapes while abstract)."""
        graphdef, state = nnx.split(self)
        leaves, treedef = jax.tree.flatten(state)
        return ModelStructure(graphdef, treedef), tuple(leaves)


def embed(
    embedding: Float[Array, "vocab embed"], tokens: Int[Array, " rows"], peers: Peers
) -> Float[Array, "rows embed"]:
    """The tokens' vectors: those of a device's own part of the vocabulary come from it, the others from its
    peers."""
    if peers == ALONE:
        return embedding[tokens]
    vectors = embedding.at[own_ids(tokens, len(embedding), peers)].get(mode="fill", fill_value=0)
    return peers.sum(vectors)


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """What of a model is known at compile time; hashable. `merge` undoes `Decoder.split`."""

    graphdef: Any
    treedef: Any

    def merge(self, weights: tuple[Any, ...]) -> Decoder:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))
