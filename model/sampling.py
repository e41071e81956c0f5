"""Chooses the next token of every sampled row, on the device, from each slot's own options.

A row's choice depends on its own logits, its slot's options and counts, and a key folded from the request's
seed, the branch's path and the token's position; never on the other rows, the slot's number or the padding.
What nobody in a step uses is left out of the program that samples for it: the host knows, and picks one of
`SAMPLERS`. (A branch inside one program would make an accelerator's host wait for the device at every step.)

The vocabulary of a model may be larger than its tokenizer's: ids that stand for nothing are never chosen.
It may be divided over several devices (`Peers`): each has its part of the logits and of what slots count, and
they tell each other bests and sums, never logits. docs/several-devices.md lists what they tell.

Order: logit bias, penalties, temperature, top-k, top-p, min-p, then a draw by Gumbel noise. Top-k, top-p and
min-p keep the tokens at or above a threshold, so that equally likely tokens are kept or dropped together, and
the best one always.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.heads import wide
from model.nucleus import keep_nucleus
from model.sharding import ALONE, ON_ONE_DEVICE, Peers, Placement, own_ids
from scheduler.sampling import OPTIONS, Option, SamplingParams

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, UInt

# Options beyond the greedy choice, as bits: what at least one of a step's samples uses.
USES_RANDOM = 1
USES_TOP = 2
USES_PENALTIES = 4
USES_BIAS = 8
USES_LOGPROBS = 16
USES_ALL = USES_RANDOM | USES_TOP | USES_PENALTIES | USES_BIAS | USES_LOGPROBS
# The sets of options that a server compiles a sampler for, the cheapest first.
SAMPLERS = (0, USES_RANDOM | USES_TOP, USES_ALL)

# Words of an assignment: slot, the two halves of the seed, OPTIONS; then bias ids and bias values.
_FIRST_OPTION = 3
_FIXED_WORDS = _FIRST_OPTION + len(OPTIONS)
NO_TOKEN = -1  # in the place of one, where there are no numbers to choose by
_MOST = 2**31 - 1  # top-k of more than the vocabulary keeps all of it
_OFF = {option.name: option.off for option in OPTIONS}


def uses_of(params: SamplingParams) -> int:
    """The USES_ bits of a slot with these options; a step's are the union over its samples."""
    random = params.temperature > 0
    cuts = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return (
        USES_RANDOM * random
        | USES_TOP * (random and cuts)
        | USES_PENALTIES * params.uses_penalties
        | USES_BIAS * bool(params.logit_bias)
        | USES_LOGPROBS * params.logprobs
    )


class SlotState(NamedTuple):
    """What the device remembers of each slot. Unused bias entries have id `vocab`, which is out of range.

    known            the ids that may be sampled, in any slot
    options          of each of OPTIONS, by its name, the slots' values: int32 or float32
    given_seen       tokens that occur in what the slot was given (its prompt)
    generated_count  how often each token was generated
    """

    known: Bool[Array, " vocab"]
    last_token: Int[Array, " slots"]
    options: dict[str, Array]
    seed: UInt[Array, "slots 2"]
    bias_id: Int[Array, "slots bias"]
    bias_value: Float[Array, "slots bias"]
    given_seen: Bool[Array, "slots vocab"]
    generated_count: Int[Array, "slots vocab"]

    @classmethod
    def abstract(
        cls, slots: int, vocab: int, max_bias: int, placement: Placement = ON_ONE_DEVICE
    ) -> SlotState:
        """Shapes, dtypes and shardings in place of arrays, for compiling ahead of time."""

        def array(dtype: Any, *shape: int, axes: tuple[str | None, ...] = ()) -> Any:
            return placement.abstract(shape, dtype, axes or (None,) * len(shape))

        by_token: tuple[str | None, ...] = (None, "vocab")
        return cls(
            known=array(jnp.bool_, vocab, axes=("vocab",)),
            last_token=array(jnp.int32, slots),
            options={option.name: array(_dtype(option), slots) for option in OPTIONS},
            seed=array(jnp.uint32, slots, 2),
            bias_id=array(jnp.int32, slots, max_bias),
            bias_value=array(jnp.float32, slots, max_bias),
            given_seen=array(jnp.bool_, slots, vocab, axes=by_token),
            generated_count=array(jnp.int32, slots, vocab, axes=by_token),
        )

    @classmethod
    def create(
        cls,
        slots: int,
        vocab: int,
        max_bias: int,
        known: Collection[int] | None = None,
        placement: Placement = ON_ONE_DEVICE,
    ) -> SlotState:
        """All slots greedy, with nothing counted. `known` are the ids that may be sampled: all, if None."""
        shapes = cls.abstract(slots, vocab, max_bias, placement)

        def filled(shape: Any, value: int | float = 0) -> Array:
            return jnp.full(shape.shape, value, shape.dtype, device=shape.sharding)

        sampled = np.isin(np.arange(vocab), [*known]) if known is not None else np.ones(vocab, bool)
        return jax.tree.map(filled, shapes)._replace(
            known=jax.device_put(sampled, shapes.known.sharding),
            options={option.name: filled(shapes.options[option.name], option.off) for option in OPTIONS},
            bias_id=filled(shapes.bias_id, vocab),
        )


class SampleInputs(NamedTuple):
    """Which rows of a step choose a token, and with what.

    row         index of the step's row whose logits choose
    slot        its slot; a padded sample has one out of range, and its result goes nowhere
    branch_key  `branch_key` of the branch's path
    position    position of the token to be chosen
    count_fed   1 where the token fed in this row counts as generated, before the choice
    """

    row: Int[Any, " samples"]
    slot: Int[Any, " samples"]
    branch_key: Int[Any, " samples"]
    position: Int[Any, " samples"]
    count_fed: Int[Any, " samples"]


class SampleOutputs(NamedTuple):
    """Chosen tokens. Log-probabilities (natural) are of the raw logits; zeros where nobody asked for them."""

    token: Int[Array, " samples"]
    logprob: Float[Array, " samples"]
    top_id: Int[Array, "samples top"]
    top_logprob: Float[Array, "samples top"]


def branch_key(path: Sequence[tuple[int, int]]) -> int:
    """A stable hash of a branch's (stage, child) path from the root, as a signed 32-bit integer."""
    digest = hashlib.blake2s(b"".join(struct.pack("<II", *step) for step in path), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def sample(
    logits: Float[Array, "samples vocab"],
    fed_token: Int[Array, " samples"],
    slots: SlotState,
    inputs: SampleInputs,
    *,
    uses: int,
    max_top_logprobs: int,
    peers: Peers = ALONE,
) -> tuple[SlotState, SampleOutputs]:
    """Counts the fed tokens, chooses the next ones and remembers them as their slots' last tokens.

    Computes in the dtype of the logits, float32 at least. `uses` holds the USES_ bits of every sample, and
    may hold more: the choice is the same, at the price of computing what is not used. `max_top_logprobs` is
    the width of the top log-probabilities and at most the vocabulary. Where `peers` share the vocabulary, the
    logits, and what slots say of each token, are this device's part of it.
    """
    counted = own_ids(fed_token, logits.shape[1], peers)
    slots = slots._replace(
        generated_count=slots.generated_count.at[inputs.slot, counted].add(inputs.count_fed, mode="drop")
    )
    raw = logits = jnp.where(slots.known, logits.astype(wide(logits.dtype)), -jnp.inf)
    if uses & USES_BIAS:
        logits = _add_bias(logits, slots, inputs.slot, peers)
    if uses & USES_PENALTIES:
        logits = _penalize(logits, slots, inputs.slot)
    token = _best(logits, peers)
    if uses & USES_RANDOM:
        drawn = _draw(logits, slots, inputs, peers, cut=bool(uses & USES_TOP))
        is_drawn = (_option("temperature", slots, inputs.slot) > 0) & (token != NO_TOKEN)
        token = jnp.where(is_drawn, drawn, token)
    if uses & USES_LOGPROBS:
        logprobs = _logprobs(raw, token, max_top_logprobs, peers)
    else:
        logprobs = _no_logprobs(token.size, max_top_logprobs)
    slots = slots._replace(last_token=slots.last_token.at[inputs.slot].set(token, mode="drop"))
    return slots, SampleOutputs(token, *logprobs)


def sampler_for(uses: int) -> int:
    """The first of SAMPLERS that has all of `uses`."""
    return next(options for options in SAMPLERS if uses & ~options == 0)


def _best(logits: Float[Array, "samples vocab"], peers: Peers) -> Int[Array, " samples"]:
    """The first of the best tokens, or NO_TOKEN where a logit is NaN, which lax.argmax takes for the best."""
    token = lax.argmax(logits, 1, jnp.int32)
    if peers == ALONE:
        best = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        return jnp.where(jnp.isnan(best), NO_TOKEN, token)
    ids = (token + peers.index * logits.shape[1]).astype(logits.dtype)  # exact: below 2**24
    bests, tokens = jnp.moveaxis(peers.gather(jnp.stack([jnp.max(logits, axis=1), ids])), 1, 0)
    first = lax.argmax(bests, 0, jnp.int32)[None]
    token = jnp.take_along_axis(tokens, first, 0)[0].astype(jnp.int32)
    return jnp.where(jnp.isnan(jnp.take_along_axis(bests, first, 0)[0]), NO_TOKEN, token)


def _dtype(option: Option) -> type[np.int32 | np.float32]:
    return np.int32 if isinstance(option.off, int) else np.float32


def _of_slot(values: Array, slot: Int[Array, " samples"], padding: int | float) -> Array:
    return values.at[slot].get(mode="fill", fill_value=padding)


def _option(name: str, slots: SlotState, slot: Int[Array, " samples"]) -> Array:
    return _of_slot(slots.options[name], slot, _OFF[name])


def _add_bias(
    logits: Float[Array, "samples vocab"], slots: SlotState, slot: Int[Array, " samples"], peers: Peers
) -> Float[Array, "samples vocab"]:
    ids = own_ids(_of_slot(slots.bias_id, slot, _MOST), logits.shape[1], peers)
    values = _of_slot(slots.bias_value, slot, 0)
    rows = jnp.arange(slot.size, dtype=jnp.int32)[:, None]
    return logits.at[rows, ids].add(values.astype(logits.dtype), mode="drop")


def _penalize(
    logits: Float[Array, "samples vocab"], slots: SlotState, slot: Int[Array, " samples"]
) -> Float[Array, "samples vocab"]:
    """Repetition as in CTRL (arXiv 1909.05858), presence and frequency as in OpenAI's API."""

    def penalty(kind: str) -> Array:
        return _option(f"{kind}_penalty", slots, slot).astype(logits.dtype)[:, None]

    count = _of_slot(slots.generated_count, slot, 0)
    generated = count > 0
    repeated = generated | _of_slot(slots.given_seen, slot, 0)
    repetition = penalty("repetition")
    logits = jnp.where(repeated, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - penalty("frequency") * count - penalty("presence") * generated


def _draw(
    logits: Float[Array, "samples vocab"],
    slots: SlotState,
    inputs: SampleInputs,
    peers: Peers,
    *,
    cut: bool,
) -> Int[Array, " samples"]:
    scaled = _scale(logits, _option("temperature", slots, inputs.slot), peers)
    if cut:
        top_k, top_p, min_p = (_option(name, slots, inputs.slot) for name in ("top_k", "top_p", "min_p"))
        scaled = keep_nucleus(scaled, top_k, top_p, min_p, peers)
    noise = _noise(slots, inputs, logits.shape[1], peers)
    return _best(scaled + noise.astype(logits.dtype), peers)


def _scale(
    logits: Float[Array, "samples vocab"],
    temperature: Float[Array, " samples"],
    peers: Peers,
) -> Float[Array, "samples vocab"]:
    """Logits relative to the row's best, over the temperature: their exp is at most 1 and never NaN."""
    best = peers.max(jnp.max(logits, axis=1, keepdims=True))
    best = jnp.where(jnp.isfinite(best), best, 0)
    least = jnp.finfo(jnp.float32).tiny  # a smaller one may be rounded to nothing
    over = jnp.where(temperature > 0, jnp.maximum(temperature, least), 1)
    return (logits - best) / over.astype(logits.dtype)[:, None]


def _noise(slots: SlotState, inputs: SampleInputs, vocab: int, peers: Peers) -> Float[Array, "samples vocab"]:
    """Gumbel noise of key fold_in(fold_in(key(seed), branch key), position): float32 in every dtype, so that
    the same seed means the same noise. A device's part of it is what a single device would draw there."""

    def of_sample(seed: Array, branch: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, branch), position)
        noise = jax.random.gumbel(key, (vocab * peers.count,), jnp.float32)
        return lax.dynamic_slice_in_dim(noise, peers.index * vocab, vocab)

    branch = lax.bitcast_convert_type(inputs.branch_key, jnp.uint32)
    return jax.vmap(of_sample)(_of_slot(slots.seed, inputs.slot, 0), branch, inputs.position)


def _logprobs(
    logits: Float[Array, "samples vocab"], token: Int[Array, " samples"], top: int, peers: Peers
) -> tuple[Array, Array, Array]:
    vocab = logits.shape[1]
    total = jax.nn.logsumexp(logits, axis=1)
    own = own_ids(token, vocab, peers)[:, None]
    chosen = jnp.take_along_axis(logits, own, axis=1, mode="fill", fill_value=-jnp.inf)[:, 0]
    top_value, top_id = lax.top_k(logits, min(top, vocab))
    if peers != ALONE:
        totals, each = jnp.moveaxis(peers.gather(jnp.stack([total, chosen])), 1, 0)
        total, chosen = jax.nn.logsumexp(totals, axis=0), jnp.max(each, axis=0)
        ids = (top_id + peers.index * vocab).astype(logits.dtype)  # exact: below 2**24
        candidates = peers.gather(jnp.stack([top_value, ids]))  # of lower ids first, as lax.top_k wants ties
        values, ids = jnp.moveaxis(candidates, (1, 2), (0, 1)).reshape(2, len(token), -1)
        top_value, best = lax.top_k(values, top)
        top_id = jnp.take_along_axis(ids, best, axis=1)
    return (
        (chosen - total).astype(jnp.float32),
        top_id.astype(jnp.int32),
        (top_value - total[:, None]).astype(jnp.float32),
    )


def _no_logprobs(samples: int, top: int) -> tuple[Array, Array, Array]:
    return (
        jnp.zeros(samples, jnp.float32),
        jnp.zeros((samples, top), jnp.int32),
        jnp.zeros((samples, top), jnp.float32),
    )


def pack_assignments(
    assignments: Sequence[tuple[int, SamplingParams]],
    *,
    capacity: int,
    slots: int,
    vocab: int,
    max_bias: int,
) -> np.ndarray:
    """(slot, options) pairs as the int32 vector that `assign` reads; floats travel as their bits.

    Raises ValueError for more than `capacity` pairs or more than `max_bias` biases of one slot.
    """
    count = len(assignments)
    if count > capacity:
        raise ValueError(f"{count} slots to assign in one call, at most {capacity}")
    words = np.zeros((capacity, _FIXED_WORDS + 2 * max_bias), np.int32)
    words[:, 0] = slots
    words[:, _FIXED_WORDS : _FIXED_WORDS + max_bias] = vocab
    for column, option in enumerate(OPTIONS, _FIRST_OPTION):
        values = [min(getattr(params, option.name), _MOST) for _, params in assignments]
        words.view(_dtype(option))[:count, column] = values
    for row, (slot, params) in zip(words, assignments, strict=False):
        biases = len(params.logit_bias)
        if biases > max_bias:
            raise ValueError(f"{biases} logit biases in one request, at most {max_bias}")
        row[0] = slot
        row[1:_FIRST_OPTION].view(np.uint32)[:] = params.seed >> 32, params.seed & 0xFFFFFFFF
        if biases:
            ids, values = zip(*params.logit_bias, strict=True)
            row[_FIXED_WORDS:][:biases] = ids
            row[_FIXED_WORDS + max_bias :].view(np.float32)[:biases] = values
    return words.reshape(-1)


def assign(slots: SlotState, packed: Int[Array, " words"]) -> SlotState:
    """Gives slots new options and clears their counts; `packed` is made by `pack_assignments`."""
    max_bias = slots.bias_id.shape[1]
    words = packed.reshape(-1, _FIXED_WORDS + 2 * max_bias)
    slot = words[:, 0]
    bias_id, bias_bits = jnp.split(words[:, _FIXED_WORDS:], 2, axis=1)

    def put(values: Array, new: Array | bool | int) -> Array:
        if isinstance(new, jax.Array):
            new = lax.bitcast_convert_type(new, values.dtype)
        return values.at[slot].set(new, mode="drop")

    return SlotState(
        known=slots.known,
        last_token=slots.last_token,
        options={
            option.name: put(slots.options[option.name], words[:, column])
            for column, option in enumerate(OPTIONS, _FIRST_OPTION)
        },
        seed=put(slots.seed, words[:, 1:_FIRST_OPTION]),
        bias_id=put(slots.bias_id, bias_id),
        bias_value=put(slots.bias_value, bias_bits),
        given_seen=put(slots.given_seen, False),
        generated_count=put(slots.generated_count, 0),
    )


def count_history(
    slots: SlotState,
    slot: Int[Array, ""],
    ids: Int[Array, " history"],
    n: Int[Array, ""],
    generated: Bool[Array, ""] | bool,
    *,
    peers: Peers = ALONE,
) -> SlotState:
    """Counts the first `n` ids as given to the slot, or as generated in it."""
    num_slots, vocab = slots.generated_count.shape
    ids = jnp.where(jnp.arange(ids.size, dtype=jnp.int32) < n, own_ids(ids, vocab, peers), vocab)
    generated_slot = jnp.where(generated, slot, num_slots)
    given_slot = jnp.where(generated, num_slots, slot)
    return slots._replace(
        given_seen=slots.given_seen.at[given_slot, ids].set(True, mode="drop"),
        generated_count=slots.generated_count.at[generated_slot, ids].add(1, mode="drop"),
    )
