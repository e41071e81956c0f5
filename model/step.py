"""One step of the device: rows in, one token per sampled row out. Knows nothing of requests.

A step's inputs are integers only and travel as one int32 vector (`StepLayout`), so that a launch is one
transfer. The vector is made in fresh memory every time: JAX on CPU reads the caller's buffer in place, and
a buffer that is written again would corrupt the step in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import attention
from attention import Capacity, TileCapacity, TileList, WorkList
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.qwen3 import ModelStructure, Qwen3
from model.sampling import SampleInputs, SampleOutputs, SlotState, sample

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

# The page, or the slot, of padding: out of range, so writes to it are dropped.
NOWHERE = 2**30


class StepInputs(NamedTuple):
    """All that a step is told, as NumPy or JAX arrays; when packed, row and sample arrays may be shorter
    than the bucket.

    tokens        token id, or -1 - slot for the token last sampled in that slot
    positions     rotary position
    write_page    page that the row's KV goes to (NOWHERE: dropped)
    write_offset  position inside that page
    work          what the rows read
    sample        which rows choose a token
    """

    tokens: Int32[Any, " rows"]
    positions: Int32[Any, " rows"]
    write_page: Int32[Any, " rows"]
    write_offset: Int32[Any, " rows"]
    work: WorkList | TileList
    sample: SampleInputs


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where each array of a bucket's StepInputs lies in its packed vector. Hashable: one per program."""

    capacity: Capacity | TileCapacity
    samples: int

    @classmethod
    def for_bucket(
        cls,
        config: ModelConfig,
        backend: str,
        rows: int,
        *,
        num_pages: int,
        page_size: int,
        samples: int,
        pages_per_read: int | None = None,
    ) -> StepLayout:
        """Room for every step of a model with at most `rows` rows, of which `samples` sample."""
        capacity = attention.capacity(
            backend,
            rows,
            num_pages,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            page_size=page_size,
            pages_per_read=pages_per_read,
        )
        return cls(capacity, samples)

    @property
    def size(self) -> int:
        """Length of the packed vector, in int32 words."""
        return _blank(self).size

    def pack(self, inputs: StepInputs) -> Int32[np.ndarray, " size"]:
        """The inputs as one vector in fresh memory, padded to the bucket.

        Raises ValueError, naming the array, if one is longer than the bucket has room for.
        """
        packed = _blank(self).copy()
        start = 0
        for (path, padding), value in zip(
            jax.tree.leaves_with_path(_padding(self)), jax.tree.leaves(inputs), strict=True
        ):
            value = np.asarray(value)
            if value.size > padding.size or value.shape[1:] != padding.shape[1:]:
                name = jax.tree_util.keystr(path)
                raise ValueError(f"{name} has shape {value.shape}, its bucket has room for {padding.shape}")
            packed[start : start + value.size] = value.reshape(-1)
            start += padding.size
        return packed

    def unpack(self, packed: Int32[Array, " size"]) -> StepInputs:
        """The arrays of a packed vector, at the bucket's full sizes; for use inside jit."""
        leaves, treedef = jax.tree.flatten(_padding(self))
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = [
            packed[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)
        ]
        return jax.tree.unflatten(treedef, parts)


@lru_cache
def _padding(layout: StepLayout) -> StepInputs:
    """A step that does nothing, which is also what the unused part of a step is padded with."""
    rows, samples = layout.capacity.rows, layout.samples
    zero_rows = np.zeros(rows, np.int32)
    sample_fields: dict[str, Any] = {name: np.zeros(samples, np.int32) for name in SampleInputs._fields}
    sample_fields |= {"slot": np.full(samples, NOWHERE, np.int32), "flags": np.zeros((), np.int32)}
    return StepInputs(
        tokens=zero_rows,
        positions=zero_rows,
        write_page=np.full(rows, NOWHERE, np.int32),
        write_offset=zero_rows,
        work=layout.capacity.empty(),
        sample=SampleInputs(**sample_fields),
    )


@lru_cache
def _blank(layout: StepLayout) -> np.ndarray:
    return np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(_padding(layout))])


def step(
    model: Qwen3,
    cache: KVCache,
    slots: SlotState,
    packed: Int32[Array, " size"],
    *,
    layout: StepLayout,
    backend: str,
    max_top_logprobs: int,
) -> tuple[KVCache, SlotState, SampleOutputs]:
    """Feeds every row, then chooses a token for every sampled row; the head runs for those rows only."""
    inputs = layout.unpack(packed)
    tokens = inputs.tokens
    fed = jnp.where(tokens < 0, slots.last_token[jnp.maximum(-1 - tokens, 0)], tokens)
    hidden, cache = model.forward(
        fed, inputs.positions, cache, inputs.write_page, inputs.write_offset, inputs.work, backend
    )
    rows = inputs.sample.row
    logits = model.logits(hidden[rows])
    slots, outputs = sample(logits, fed[rows], slots, inputs.sample, max_top_logprobs)
    return cache, slots, outputs


StepProgram = Callable[
    [tuple[Any, ...], KVCache, SlotState, np.ndarray], tuple[KVCache, SlotState, SampleOutputs]
]


def compile_step(
    structure: ModelStructure,
    weights: tuple[Any, ...],
    cache: KVCache,
    slots: SlotState,
    *,
    layout: StepLayout,
    backend: str,
    max_top_logprobs: int,
) -> StepProgram:
    """Compiles a bucket's step ahead of time, from arrays or from their shapes (jax.ShapeDtypeStruct).

    Calling convention of the program: `cache, slots, outputs = program(weights, cache, slots, packed)`,
    with (structure, weights) from `Qwen3.split` and `packed` from `layout.pack`. The cache and the slots
    are donated and updated in place: use what is returned. The weights are not.
    """

    def taper_step(
        weights: tuple[Any, ...], cache: KVCache, slots: SlotState, packed: Any
    ) -> tuple[KVCache, SlotState, SampleOutputs]:
        return step(
            structure.merge(weights),
            cache,
            slots,
            packed,
            layout=layout,
            backend=backend,
            max_top_logprobs=max_top_logprobs,
        )

    packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
    jitted = jax.jit(taper_step, donate_argnums=(1, 2))
    return jitted.lower(weights, cache, slots, packed).compile()
