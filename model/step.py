"""One step of the device: rows in, one token per sampled row out. Knows nothing of requests.

A step's inputs are integers only and travel as one int32 vector (`StepLayout`), so that a launch is one
transfer. JAX on CPU reads the caller's buffer in place, and a buffer that is written again would corrupt the
step in flight: a `StepBuffer` is, but only by who knows that the step has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from attention import Backend, Capacity, Work
from attention.heads import wide
from model.config import ModelConfig
from model.decoder import Decoder, ModelStructure
from model.kv_cache import KVCache, page_sizes
from model.sampling import SAMPLERS, SampleInputs, SampleOutputs, SlotState, sample, sampler_for
from model.sharding import EVERYWHERE, ON_ONE_DEVICE, Placement

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

# On a GPU, XLA makes one product of those that have one input, up to this size of weight in MiB, by a step's
# rows (its own limit: 32, whatever the rows). On an H200, gate and up as one save Qwen3-8B 3 to 5 % of a step
# of 8 to 64 rows, and make one of a single row ten times as long; q, k and v as one cost 5 % at 256.
MERGED_MIB = ((range(8, 65), 112), (range(129, 257), 0))

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
    work: Work
    sample: SampleInputs


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where each array of a bucket's StepInputs lies in its packed vector, and what its rows attend with.

    Hashable: one per program. Over a mesh every device gets the same vector: `capacity` is for the heads of
    one device, and all have as many.
    """

    backend: Backend
    capacity: Capacity
    page_size: int
    samples: int
    placement: Placement = ON_ONE_DEVICE

    @classmethod
    def for_bucket(
        cls,
        config: ModelConfig,
        backend: Backend,
        rows: int,
        *,
        num_pages: int,
        page_size: int,
        samples: int,
        pages_per_read: int | None = None,
        paths: int = 1,
        placement: Placement = ON_ONE_DEVICE,
    ) -> StepLayout:
        """Room for every step of a model with at most `rows` rows, of which `samples` sample.

        `paths` is as in `attention.backend.Sizes`.
        """
        sizes = replace(page_sizes(config, num_pages, page_size, placement), paths=paths)
        capacity = backend.capacity(rows, sizes, pages_per_read)
        return cls(backend, capacity, page_size, samples, placement)

    @property
    def size(self) -> int:
        """Length of the packed vector, in int32 words."""
        return _blank(self).size

    def pack(self, inputs: StepInputs) -> Int32[np.ndarray, " size"]:
        """The inputs as one vector in fresh memory, padded to the bucket.

        Raises ValueError, naming the array, if one is longer than the bucket has room for.
        """
        return StepBuffer(self).pack(inputs)

    def unpack(self, packed: Int32[Array, " size"]) -> StepInputs:
        """The arrays of a packed vector, at the bucket's full sizes; for use inside jit."""
        leaves, treedef = jax.tree.flatten(_padding(self))
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = [
            packed[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)
        ]
        return jax.tree.unflatten(treedef, parts)


class StepBuffer:
    """A packed vector in memory that is used again.

    Most of a vector is room for page references, of which a step needs few: what is written is the step's own
    arrays, and padding where those of the step before it were longer.
    """

    def __init__(self, layout: StepLayout) -> None:
        self._places = _places(layout)
        self._blank = _blank(layout)
        self._vector = self._blank.copy()
        self._filled = [0] * len(self._places)  # of each array: words that are not padding

    def pack(self, inputs: StepInputs) -> Int32[np.ndarray, " size"]:
        """As `StepLayout.pack`, but the vector is the same one every time."""
        packed, filled = self._vector, self._filled
        for index, (place, value) in enumerate(zip(self._places, jax.tree.leaves(inputs), strict=True)):
            value = np.asarray(value)
            size, start = value.size, place.start
            if size > place.size or value.shape[1:] != place.shape[1:]:
                raise ValueError(
                    f"{place.name} has shape {value.shape}, its bucket has room for {place.shape}"
                )
            packed[start : start + size] = value.reshape(-1)
            if size < filled[index]:
                behind = slice(start + size, start + filled[index])
                packed[behind] = self._blank[behind]
            filled[index] = size
        return packed


class _Place(NamedTuple):
    """Where an array of StepInputs lies in the packed vector."""

    name: str
    start: int
    size: int
    shape: tuple[int, ...]


@lru_cache
def _places(layout: StepLayout) -> tuple[_Place, ...]:
    leaves = jax.tree.leaves_with_path(_padding(layout))
    starts = accumulate((leaf.size for _, leaf in leaves), initial=0)
    return tuple(
        _Place(jax.tree_util.keystr(path), start, leaf.size, leaf.shape)
        for (path, leaf), start in zip(leaves, starts, strict=False)
    )


@lru_cache
def _padding(layout: StepLayout) -> StepInputs:
    """A step that does nothing, which is also what the unused part of a step is padded with."""
    rows, samples = layout.capacity.rows, layout.samples
    zero_rows = np.zeros(rows, np.int32)
    sample_fields: dict[str, Any] = {name: np.zeros(samples, np.int32) for name in SampleInputs._fields}
    sample_fields["slot"] = np.full(samples, NOWHERE, np.int32)
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


def forward(
    model: Decoder,
    cache: KVCache,
    last_token: Int32[Array, " slots"],
    packed: Int32[Array, " size"],
    *,
    layout: StepLayout,
) -> tuple[KVCache, Float[Array, "samples vocab"], Int32[Array, " samples"]]:
    """Feeds every row; the logits of those that sample, and what was fed in them.

    The head runs for the sampled rows only. Over a mesh, of a device's own part of the vocabulary.
    """
    inputs = layout.unpack(packed)
    tokens = inputs.tokens
    fed = jnp.where(tokens < 0, last_token[jnp.maximum(-1 - tokens, 0)], tokens)
    hidden, cache = model.forward(
        fed,
        inputs.positions,
        cache,
        inputs.write_page,
        inputs.write_offset,
        inputs.work,
        layout.backend,
        layout.placement,
    )
    rows = inputs.sample.row
    return cache, model.logits(hidden[rows]), fed[rows]


@dataclass(frozen=True, slots=True)
class StepProgram:
    """A bucket's compiled step: the model's part, and a sampler for each of some sets of options.

    `program(weights, cache, slots, packed, uses)`, with weights from `Decoder.split` and `packed` from
    `layout.pack`, gives `cache, slots, outputs` without waiting for the device. The cache and the slots are
    donated and updated in place: use what is returned. `uses` are model.sampling's bits of the step, `inputs`
    where the packed vector goes.
    """

    layout: StepLayout
    inputs: Sharding
    forward: jax.stages.Compiled
    samplers: Mapping[int, jax.stages.Compiled]

    @property
    def working_bytes(self) -> int:
        """Memory of each device for a step beyond its arguments, the donated cache and the donated slots."""
        parts: list[Any] = [part.memory_analysis() for part in (self.forward, *self.samplers.values())]
        sizes = [p.temp_size_in_bytes + p.output_size_in_bytes - p.alias_size_in_bytes for p in parts]
        return sizes[0] + max(sizes[1:])

    def __call__(
        self, weights: tuple[Any, ...], cache: KVCache, slots: SlotState, packed: Any, uses: int = 0
    ) -> tuple[KVCache, SlotState, SampleOutputs]:
        packed = jax.device_put(packed, self.inputs)
        cache, logits, fed = self.forward(weights, cache, slots.last_token, packed)
        slots, outputs = self.samplers[sampler_for(uses)](slots, logits, fed, packed)
        return cache, slots, outputs


def compile_step(
    structure: ModelStructure,
    weights: tuple[Any, ...],
    cache: KVCache,
    slots: SlotState,
    *,
    layout: StepLayout,
    max_top_logprobs: int,
    samplers: Sequence[int] = SAMPLERS,
) -> StepProgram:
    """Compiles a bucket's step ahead of time, from arrays or from their shapes (jax.ShapeDtypeStruct)."""

    placement = layout.placement

    def taper_step(weights: tuple[Any, ...], cache: KVCache, last_token: Array, packed: Array) -> Any:
        return forward(structure.merge(weights), cache, last_token, packed, layout=layout)

    def taper_sample(uses: int, slots: SlotState, logits: Array, fed: Array, packed: Array) -> Any:
        inputs, peers = layout.unpack(packed).sample, placement.vocab_peers
        return sample(logits, fed, slots, inputs, uses=uses, max_top_logprobs=max_top_logprobs, peers=peers)

    vocab, samples = slots.known.shape[0], layout.samples
    packed = placement.abstract((layout.size,), jnp.int32, [None])
    logits = placement.abstract((samples, vocab), wide(structure.merge(weights).dtype), [None, "vocab"])
    fed = placement.abstract((samples,), jnp.int32, [None])

    arguments = weights, cache, slots.last_token, packed
    limit = next((mib for rows, mib in MERGED_MIB if layout.capacity.rows in rows), None)
    merged = {} if limit is None else {"xla_gpu_dot_merger_threshold_mb": limit}
    model = placement.compile(taper_step, arguments, (cache, logits, fed), donate=[1], gpu_options=merged)

    def sampler(uses: int) -> jax.stages.Compiled:
        arguments, results = (slots, logits, fed, packed), (slots, EVERYWHERE)
        return placement.compile(partial(taper_sample, uses), arguments, results, donate=[0])

    return StepProgram(layout, packed.sharding, model, {uses: sampler(uses) for uses in samplers})
