"""Offline decoding: a whole generation in one jitted loop on the device. No scheduler, no server.

It is the server's independent oracle: it lays out its own pages, once, for the final lengths.
Each prompt but for its last token is read first, into pages that all of its branches share. Then every
branch feeds that last token as its own first row, on pages of its own, and what it sampled from there on.
Inside the loop only how far the branches' pages are filled changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention import Backend, default_backend
from model.decode_batch import STRIDE, Arrays, Batch, lay_out_batch
from model.decoder import Decoder, ModelStructure
from model.kv_cache import KVCache
from model.sampling import (
    NO_TOKEN,
    SampleInputs,
    SlotState,
    assign,
    pack_assignments,
    sample,
    sampler_for,
    uses_of,
)
from model.sharding import EVERYWHERE, ON_ONE_DEVICE, Placement
from scheduler.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated: `ids[prompt][branch]`, without the end-of-sequence token that ended a branch.

    `steps` are those that the loop made, a multiple of STRIDE. `seconds` is its time on the device, reading
    the prompts included, compiling not.
    """

    ids: list[list[list[int]]]
    steps: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(len(branch) for branches in self.ids for branch in branches) / self.seconds


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    branches: int = 1,
    sampling: SamplingParams | None = None,
    eos_ids: Sequence[int] = (),
    known: Collection[int] | None = None,
    page_size: int = 16,
    backend: Backend | None = None,
    placement: Placement = ON_ONE_DEVICE,
    on_compiled: Callable[[float], None] = lambda seconds: None,
) -> Generation:
    """Continues every prompt (token ids) in `branches` branches, until `eos_ids` or `max_tokens`.

    `known` are the ids that may be sampled: a tokenizer's, or all. The model lies where `placement` says.
    The random key of a token is folded from the seed, the branch's path and the token's position: the path is
    that of a server's request without stages for one branch, and with one parallel stage of branches that
    begin with nothing for several. All prompts are read in one pass. `on_compiled` is told how many seconds
    compiling took, before the device generates.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, more tokens than the model's context, a
        seed of more than 64 bits, pages without positions, or logits that are not numbers.
    """
    sampling = replace(sampling or SamplingParams(), logprobs=False)
    batch, cache, wanted = _prepared(
        model,
        prompts,
        max_tokens=max_tokens,
        branches=branches,
        sampling=sampling,
        eos_ids=eos_ids,
        page_size=page_size,
        backend=backend or default_backend(model.config.head_dim, model.dtype),
        placement=placement,
    )
    began = time.perf_counter()
    program = compile_generation(*wanted)
    on_compiled(time.perf_counter() - began)
    slots = _slots(model, prompts, branches, sampling, known, placement)
    arguments = model.split()[1], cache.zeros(), slots, batch.arrays
    started = time.perf_counter()
    tokens, *_ = program(*arguments)
    tokens = np.asarray(tokens)
    seconds = time.perf_counter() - started
    rows = [_until(row, eos_ids) for row in tokens[:max_tokens].T.tolist()]
    ids = [rows[i : i + branches] for i in range(0, len(rows), branches)]
    return Generation(ids, steps=int((tokens[:, 0] >= 0).sum()), seconds=seconds)


def compile_ahead(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    branches: int = 1,
    sampling: SamplingParams | None = None,
    page_size: int = 16,
    backend: Backend,
    placement: Placement,
) -> jax.stages.Compiled:
    """The program that `generate` would run, from a model that has no weights yet: `place_model` says where.

    The devices of the placement need not be here. Raises ValueError as `generate` does.
    """
    _, _, wanted = _prepared(
        model,
        prompts,
        max_tokens=max_tokens,
        branches=branches,
        sampling=replace(sampling or SamplingParams(), logprobs=False),
        eos_ids=(),
        page_size=page_size,
        backend=backend,
        placement=placement,
    )
    return compile_generation(*wanted)


def _prepared(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    branches: int,
    sampling: SamplingParams,
    eos_ids: Sequence[int],
    page_size: int,
    backend: Backend,
    placement: Placement,
) -> tuple[Batch, KVCache, tuple[Any, ...]]:
    """What a generation is told, the shapes of its cache, and what `compile_generation` wants for it."""
    _check(model, prompts, max_tokens, branches)
    if page_size < 1:
        raise ValueError(f"a page needs at least one position, not {page_size}")
    if not 0 <= sampling.seed < 2**64:
        raise ValueError(f"a seed has 64 bits: 0..{2**64 - 1}, not {sampling.seed}")
    config = model.config
    batch = lay_out_batch(prompts, branches, max_tokens, page_size, eos_ids, config, backend, placement)
    cache = KVCache.abstract(backend, config, batch.num_pages, page_size, model.dtype, placement)
    slots = SlotState.abstract(len(prompts) * branches, config.vocab_size, _most_bias(sampling), placement)
    structure, weights = model.split()
    shapes = _Shapes.of((weights, cache, slots, batch.arrays))
    uses = sampler_for(uses_of(sampling))
    return batch, cache, (structure, shapes, backend, page_size, uses, placement)


def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_tokens: int, branches: int) -> None:
    if not prompts or max_tokens < 1 or branches < 1:
        raise ValueError("there must be a prompt, and at least one token and one branch to generate")
    vocab, context = model.config.vocab_size, model.config.max_context
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt needs at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"a prompt's token ids must be in 0..{vocab - 1}, the model's vocabulary")
        if len(prompt) + max_tokens > context:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {max_tokens} new ones exceed the model's context, {context}"
            )


def _until(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens before the first end-of-sequence one. Raises ValueError where the model came to no token."""
    tokens = tokens[: next((i for i, token in enumerate(tokens) if token in eos_ids), len(tokens))]
    if NO_TOKEN in tokens:
        raise ValueError("the model came to logits that are not numbers")
    return tokens


# --- slots -----------------------------------------------------------------------------------------------


def _most_bias(sampling: SamplingParams) -> int:
    """Room for biases in a slot."""
    return max(1, len(sampling.logit_bias))


def _slots(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    branches: int,
    sampling: SamplingParams,
    known: Collection[int] | None,
    placement: Placement,
) -> SlotState:
    """A slot for each branch, whose last token is its prompt's last."""
    count, vocab, bias = len(prompts) * branches, model.config.vocab_size, _most_bias(sampling)
    slots = SlotState.create(count, vocab, bias, known, placement)
    assignments = [(slot, sampling) for slot in range(count)]
    packed = pack_assignments(assignments, capacity=count, slots=count, vocab=vocab, max_bias=bias)
    slots = assign(slots, jnp.asarray(packed))
    given = np.zeros((count, vocab), bool)
    for slot in range(count):
        given[slot, list(prompts[slot // branches])] = True
    last = np.repeat(np.array([prompt[-1] for prompt in prompts], np.int32), branches)
    return slots._replace(
        last_token=jax.device_put(last, slots.last_token.sharding),
        given_seen=jax.device_put(given, slots.given_seen.sharding),
    )


# --- the program --------------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """How far the loop is: `step` tokens of each branch in `tokens`, and which branches have ended."""

    step: Int32[Any, ""]
    tokens: Int32[Array, "max_tokens branches"]
    ended: Bool[Array, " branches"]
    cache: KVCache
    slots: SlotState


def decode_loop(
    weights: tuple[Any, ...],
    cache: KVCache,
    slots: SlotState,
    arrays: Arrays,
    *,
    structure: ModelStructure,
    backend: Backend,
    page_size: int,
    uses: int,
    placement: Placement = ON_ONE_DEVICE,
) -> tuple[Int32[Array, "max_tokens branches"], KVCache, SlotState]:
    """Reads the prompts, then samples until every branch has ended. The cache and slots may be donated.

    `uses`: model.sampling's bits of what the branches' sampling needs. Over a mesh, inside
    `placement.program`, weights, cache and slots are one device's parts.
    """
    model = structure.merge(weights)
    arrays = jax.tree.map(jnp.asarray, arrays)
    rows = arrays.prompts
    _, cache = model.forward(
        rows.tokens, rows.positions, cache, rows.write_page, rows.write_offset, rows.work, backend, placement
    )
    max_tokens, count = arrays.tokens.shape

    def unfinished(progress: Progress) -> Array:
        return (progress.step < max_tokens) & ~progress.ended.all()

    def stride(progress: Progress) -> Progress:
        feed = partial(_feed, model, arrays, backend, page_size, uses, placement)
        return lax.fori_loop(0, STRIDE, lambda _, progress: feed(progress), progress)

    start = Progress(np.int32(0), arrays.tokens, jnp.zeros(count, bool), cache, slots)
    end = lax.while_loop(unfinished, stride, start)
    return end.tokens, end.cache, end.slots


def _feed(
    model: Decoder,
    arrays: Arrays,
    backend: Backend,
    page_size: int,
    uses: int,
    placement: Placement,
    progress: Progress,
) -> Progress:
    """Feeds every branch its last token, and samples the next."""
    step, tokens, ended, cache, slots = progress
    count, begin = ended.size, arrays.tail_begin
    fed, positions = slots.last_token, arrays.start + step
    filled = jnp.where(begin < 0, -1, jnp.clip(step + 1 - begin, 0, page_size))
    hidden, cache = model.forward(
        fed,
        positions,
        cache,
        arrays.tail_pages[:, step // page_size],
        jnp.broadcast_to(step % page_size, (count,)),
        backend.refill(arrays.work, filled),
        backend,
        placement,
    )
    every = jnp.arange(count, dtype=jnp.int32)
    inputs = SampleInputs(
        row=every,
        slot=every,
        branch_key=arrays.branch_key,
        position=positions + 1,
        count_fed=jnp.broadcast_to((step > 0).astype(jnp.int32), (count,)),
    )
    slots, outputs = sample(
        model.logits(hidden),
        fed,
        slots,
        inputs,
        uses=uses,
        max_top_logprobs=1,
        peers=placement.vocab_peers,
    )
    tokens = lax.dynamic_update_slice_in_dim(tokens, outputs.token[None], step, 0)
    ended |= (outputs.token[:, None] == arrays.eos_ids).any(1)
    return Progress(step + 1, tokens, ended, cache, slots)


@dataclass(frozen=True, slots=True)
class _Shapes:
    """The shapes, dtypes and shardings of a call's arguments, hashable."""

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> _Shapes:
        leaves, treedef = jax.tree.flatten(arguments)
        return cls(
            treedef,
            tuple(
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
                for leaf in leaves
            ),
        )


@lru_cache(maxsize=16)
def compile_generation(
    structure: ModelStructure,
    shapes: _Shapes,
    backend: Backend,
    page_size: int,
    uses: int,
    placement: Placement = ON_ONE_DEVICE,
) -> jax.stages.Compiled:
    """`decode_loop` compiled for (weights, cache, slots, arrays); cache and slots are donated."""
    loop = partial(
        decode_loop,
        structure=structure,
        backend=backend,
        page_size=page_size,
        uses=uses,
        placement=placement,
    )
    arguments = jax.tree.unflatten(shapes.treedef, shapes.leaves)
    _, cache, slots, _ = arguments
    return placement.compile(loop, arguments, (EVERYWHERE, cache, slots), donate=[1, 2])
