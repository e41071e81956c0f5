"""Chooses the next token of every sampled row, on the device, from each slot's own options.

A row's choice depends on its own logits, its slot's options and counts, and a key folded from the request's
seed, the branch's path and the token's position; never on the other rows, the slot's number or the padding.
What nobody in a step uses is left out of the program that samples for it: the host knows, and picks one of
`SAMPLERS`. (A branch inside one program would make an accelerator's host wait for the device at every step.)

The vocabulary of a model may be larger than its tokenizer's: ids that stand for nothing are never chosen.

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
    def create(cls, slots: int, vocab: int, max_bias: int, known: Collection[int] | None = None) -> SlotState:
        """All slots greedy, with nothing counted. `known` are the ids that may be sampled: all, if None."""
        sampled = np.isin(np.arange(vocab), [*known]) if known is not None else np.ones(vocab, bool)
        return cls(
            known=jnp.asarray(sampled),
            last_token=jnp.zeros(slots, jnp.int32),
            options={option.name: jnp.full(slots, option.off, _dtype(option)) for option in OPTIONS},
            seed=jnp.zeros((slots, 2), jnp.uint32),
            bias_id=jnp.full((slots, max_bias), vocab, jnp.int32),
            bias_value=jnp.zeros((slots, max_bias), jnp.float32),
            given_seen=jnp.zeros((slots, vocab), jnp.bool_),
            generated_count=jnp.zeros((slots, vocab), jnp.int32),
        )

    @classmethod
    def abstract(cls, slots: int, vocab: int, max_bias: int) -> SlotState:
        """Shapes and dtypes in place of arrays, for compiling ahead of time."""
        return jax.eval_shape(lambda: cls.create(slots, vocab, max_bias))


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
) -> tuple[SlotState, SampleOutputs]:
    """Counts the fed tokens, chooses the next ones and remembers them as their slots' last tokens.

    Computes in the dtype of the logits, float32 at least. `uses` holds the USES_ bits of every sample, and
    may hold more: the choice is the same, at the price of computing what is not used. `max_top_logprobs` is
    the width of the top log-probabilities and at most the vocabulary.
    """
    slots = slots._replace(
        generated_count=slots.generated_count.at[inputs.slot, fed_token].add(inputs.count_fed, mode="drop")
    )
    raw = logits = jnp.where(slots.known, logits.astype(wide(logits.dtype)), -jnp.inf)
    if uses & USES_BIAS:
        logits = _add_bias(logits, slots, inputs.slot)
    if uses & USES_PENALTIES:
        logits = _penalize(logits, slots, inputs.slot)
    token = _draw(logits, slots, inputs, cut=bool(uses & USES_TOP)) if uses & USES_RANDOM else _best(logits)
    if uses & USES_LOGPROBS:
        logprobs = _logprobs(raw, token, max_top_logprobs)
    else:
        logprobs = _no_logprobs(token.size, max_top_logprobs)
    slots = slots._replace(last_token=slots.last_token.at[inputs.slot].set(token, mode="drop"))
    return slots, SampleOutputs(token, *logprobs)


def sampler_for(uses: int) -> int:
    """The first of SAMPLERS that has all of `uses`."""
    return next(options for options in SAMPLERS if uses & ~options == 0)


def _best(logits: Float[Array, "samples vocab"]) -> Int[Array, " samples"]:
    return lax.argmax(logits, 1, jnp.int32)


def _dtype(option: Option) -> type[np.int32 | np.float32]:
    return np.int32 if isinstance(option.off, int) else np.float32


def _of_slot(values: Array, slot: Int[Array, " samples"], padding: int | float) -> Array:
    return values.at[slot].get(mode="fill", fill_value=padding)


def _option(name: str, slots: SlotState, slot: Int[Array, " samples"]) -> Array:
    return _of_slot(slots.options[name], slot, _OFF[name])


def _add_bias(
    logits: Float[Array, "samples vocab"], slots: SlotState, slot: Int[Array, " samples"]
) -> Float[Array, "samples vocab"]:
    ids = _of_slot(slots.bias_id, slot, logits.shape[1])
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
    logits: Float[Array, "samples vocab"], slots: SlotState, inputs: SampleInputs, *, cut: bool
) -> Int[Array, " samples"]:
    temperature = _option("temperature", slots, inputs.slot)
    scaled = _scale(logits, temperature)
    if cut:
        scaled = _cut(scaled, slots, inputs.slot)
    drawn = _best(scaled + _noise(slots, inputs, logits.shape[1]).astype(logits.dtype))
    return jnp.where(temperature > 0, drawn, _best(logits))


def _scale(
    logits: Float[Array, "samples vocab"], temperature: Float[Array, " samples"]
) -> Float[Array, "samples vocab"]:
    """Logits relative to the row's best, over the temperature: their exp is at most 1 and never NaN."""
    best = jnp.max(logits, axis=1, keepdims=True)
    best = jnp.where(jnp.isfinite(best), best, 0)
    least = jnp.finfo(jnp.float32).tiny  # a smaller one may be rounded to nothing
    over = jnp.where(temperature > 0, jnp.maximum(temperature, least), 1)
    return (logits - best) / over.astype(logits.dtype)[:, None]


def _noise(slots: SlotState, inputs: SampleInputs, vocab: int) -> Float[Array, "samples vocab"]:
    """Gumbel noise of key fold_in(fold_in(key(seed), branch key), position): float32 in every dtype, so that
    the same seed means the same noise."""

    def of_sample(seed: Array, branch: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, branch), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    branch = lax.bitcast_convert_type(inputs.branch_key, jnp.uint32)
    return jax.vmap(of_sample)(_of_slot(slots.seed, inputs.slot, 0), branch, inputs.position)


def _cut(
    scaled: Float[Array, "samples vocab"], slots: SlotState, slot: Int[Array, " samples"]
) -> Float[Array, "samples vocab"]:
    """Drops what top-k, top-p (of the mass that top-k left) and min-p exclude."""
    top_k = _option("top_k", slots, slot)
    top_p = _option("top_p", slots, slot).astype(scaled.dtype)
    min_p = _option("min_p", slots, slot).astype(scaled.dtype)
    keys = _ordered_bits(scaled)
    found = _threshold(keys, jnp.ones_like(scaled), top_k.astype(scaled.dtype))
    at_least = jnp.where(top_k > 0, found, 0)
    mass = jnp.where(keys >= at_least[:, None], jnp.exp(scaled), 0)
    found = _threshold(keys, mass, top_p * jnp.sum(mass, axis=1))
    at_least = jnp.maximum(at_least, jnp.where(top_p < 1, found, 0))
    kept = (keys >= at_least[:, None]) & (scaled >= jnp.log(min_p)[:, None])
    best = scaled >= 0  # the mass that a tiny top-p asks for may be rounded to nothing
    return jnp.where(kept | best, scaled, -jnp.inf)


def _ordered_bits(values: Float[Array, "samples vocab"]) -> UInt[Array, "samples vocab"]:
    """Unsigned integers in the order of the floats."""
    bits = lax.bitcast_convert_type(values, jnp.uint64 if values.dtype == jnp.float64 else jnp.uint32)
    sign = jnp.array(1, bits.dtype) << (8 * bits.dtype.itemsize - 1)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)


def _threshold(
    keys: UInt[Array, "samples vocab"],
    weight: Float[Array, "samples vocab"],
    target: Float[Array, " samples"],
) -> UInt[Array, " samples"]:
    """The greatest t whose keys >= t weigh `target` at least; 0 where all of them weigh less.

    Found bit by bit from the top: a few passes over the row, where a sort takes many times longer.
    """
    bits = 8 * keys.dtype.itemsize

    def try_bit(i: Array, found: Array) -> Array:
        candidate = found | (jnp.array(1, keys.dtype) << (bits - 1 - i).astype(keys.dtype))
        reached = jnp.sum(jnp.where(keys >= candidate[:, None], weight, 0), axis=1) >= target
        return jnp.where(reached, candidate, found)

    return lax.fori_loop(0, bits, try_bit, jnp.zeros(keys.shape[:1], keys.dtype))


def _logprobs(
    logits: Float[Array, "samples vocab"], token: Int[Array, " samples"], top: int
) -> tuple[Array, Array, Array]:
    total = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1) - total
    top_value, top_id = lax.top_k(logits, top)
    return (
        chosen[:, 0].astype(jnp.float32),
        top_id.astype(jnp.int32),
        (top_value - total).astype(jnp.float32),
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
) -> SlotState:
    """Counts the first `n` ids as given to the slot, or as generated in it."""
    num_slots, vocab = slots.generated_count.shape
    ids = jnp.where(jnp.arange(ids.size, dtype=jnp.int32) < n, ids, vocab)
    generated_slot = jnp.where(generated, slot, num_slots)
    given_slot = jnp.where(generated, num_slots, slot)
    return slots._replace(
        given_seen=slots.given_seen.at[given_slot, ids].set(True, mode="drop"),
        generated_count=slots.generated_count.at[generated_slot, ids].add(1, mode="drop"),
    )
