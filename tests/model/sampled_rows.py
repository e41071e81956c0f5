"""Rows of logits that are sampled in one batch, and the token that NumPy chooses for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import jax
import numpy as np

from model.sampling import (
    SampleInputs,
    SampleOutputs,
    SlotState,
    assign,
    branch_key,
    count_history,
    pack_assignments,
    sample,
    sampler_for,
    uses_of,
)
from scheduler.sampling import SamplingParams
from tests.model.noise import noise

VOCAB = 101
SLOTS = 13
MAX_BIAS = 4
TOP = 5
SAMPLES = 16  # every batch is padded to one of two sizes, so that little is compiled
MANY = 1024

run_sample = jax.jit(sample, static_argnames=("uses", "max_top_logprobs"))
run_assign = jax.jit(assign)
run_count = jax.jit(count_history)

GREEDY = SamplingParams()
WARM = SamplingParams(temperature=0.8, seed=3)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample of a test: what the slot uses, what it has seen, and where it stands."""

    logits: np.ndarray
    sampling: SamplingParams = GREEDY
    path: tuple[tuple[int, int], ...] = ()
    position: int = 7
    given: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    fed: int | None = None


def random_logits(dtype: np.dtype, seed: int = 0, rows: int = 1) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=(rows, VOCAB))).astype(dtype)


def few(logits: Sequence[float], dtype: np.dtype) -> np.ndarray:
    """A row in which only the first tokens are possible."""
    return np.array([*logits, *[-np.inf] * (VOCAB - len(logits))], dtype)


def prepare(rows: Sequence[Row], slots: Sequence[int], known: Sequence[int] | None = None) -> SlotState:
    state = SlotState.create(SLOTS, VOCAB, MAX_BIAS, known)
    pairs = [(slot, row.sampling) for slot, row in zip(slots, rows, strict=True)]
    packed = pack_assignments(pairs, capacity=SLOTS, slots=SLOTS, vocab=VOCAB, max_bias=MAX_BIAS)
    state = run_assign(state, packed)
    for slot, row in zip(slots, rows, strict=True):
        for ids, generated in ((row.given, False), (row.generated, True)):
            if ids:
                padded = np.zeros(8, np.int32)
                padded[: len(ids)] = ids
                state = run_count(state, np.int32(slot), padded, np.int32(len(ids)), generated)
    return state


def choose(
    rows: Sequence[Row],
    slots: Sequence[int] | None = None,
    samples: int = SAMPLES,
    sampler: int | None = None,
    known: Sequence[int] | None = None,
) -> tuple[SlotState, SampleOutputs]:
    """Samples the rows in one batch, padded to `samples`; with the cheapest sampler unless told otherwise."""
    slots = range(len(rows)) if slots is None else slots
    padding = samples - len(rows)

    def padded(values: Sequence[int], fill: int) -> np.ndarray:
        return np.array([*values, *[fill] * padding], np.int32)

    inputs = SampleInputs(
        row=padded(range(len(rows)), 0),
        slot=padded(slots, SLOTS),
        branch_key=padded([branch_key(row.path) for row in rows], 0),
        position=padded([row.position for row in rows], 0),
        count_fed=padded([row.fed is not None for row in rows], 1),
    )
    logits = np.stack([row.logits for row in rows] + [rows[0].logits] * padding)
    fed = padded([row.fed or 0 for row in rows], 5)
    uses = reduce(or_, (uses_of(row.sampling) for row in rows))
    sampler = sampler_for(uses) if sampler is None else sampler
    state = prepare(rows, slots, known)
    state, outputs = run_sample(logits, fed, state, inputs, uses=sampler, max_top_logprobs=TOP)
    return state, jax.tree.map(lambda array: np.asarray(array)[: len(rows)], outputs)


def tokens(rows: Sequence[Row], **batch) -> list[int]:
    return choose(rows, **batch)[1].token.tolist()


def tokens_of_one_slot(rows: Sequence[Row]) -> list[int]:
    """Draws up to MANY positions of one slot at once; the rows differ in position only."""
    first = rows[0]
    zeros = np.zeros(MANY, np.int32)
    inputs = SampleInputs(
        row=zeros,
        slot=zeros,
        branch_key=np.full(MANY, branch_key(first.path), np.int32),
        position=np.resize(np.array([row.position for row in rows], np.int32), MANY),
        count_fed=zeros,
    )
    logits = np.broadcast_to(first.logits, (MANY, VOCAB))
    uses, state = sampler_for(uses_of(first.sampling)), prepare([first], [0])
    outputs = run_sample(logits, zeros, state, inputs, uses=uses, max_top_logprobs=TOP)[1]
    return np.asarray(outputs.token)[: len(rows)].tolist()


def gumbel(row: Row) -> np.ndarray:
    return noise(row.sampling.seed, branch_key(row.path), row.position, VOCAB)


def penalized(row: Row) -> np.ndarray:
    """The logits after bias and penalties, one token at a time."""
    s = row.sampling
    logits = row.logits.copy()
    for token, bias in s.logit_bias:
        logits[token] += logits.dtype.type(bias)
    generated = list(row.generated) + ([] if row.fed is None else [row.fed])
    for token in range(logits.size):
        count = generated.count(token)
        if count or token in row.given:
            factor = np.float32(s.repetition_penalty)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        logits[token] -= count * np.float32(s.frequency_penalty)
        logits[token] -= (count > 0) * np.float32(s.presence_penalty)
    return logits


def kept_tokens(logits: np.ndarray, s: SamplingParams) -> list[int]:
    """Top-k, top-p and min-p by sorting, most likely token first."""
    order = np.argsort(-logits, kind="stable")
    order = order[: s.top_k or None]
    chances = np.exp((logits[order] - logits[order[0]]) / np.float32(s.temperature))
    before = np.cumsum(chances) - chances
    nucleus = before < np.float32(s.top_p) * chances.sum()
    return order[(nucleus | (s.top_p >= 1)) & (chances >= s.min_p * chances[0])].tolist()


def expected(row: Row) -> int:
    logits = penalized(row)
    if row.sampling.temperature == 0:
        return int(np.argmax(logits))
    kept = kept_tokens(logits, row.sampling)
    scores = logits / np.float32(row.sampling.temperature) + gumbel(row)
    return max(kept, key=lambda token: scores[token])


CASES = {
    "greedy": GREEDY,
    "temperature": SamplingParams(temperature=1.7),
    "top-k": SamplingParams(temperature=1.5, top_k=4),
    "top-p": SamplingParams(temperature=1.5, top_p=0.6),
    "min-p": SamplingParams(temperature=1.5, min_p=0.2),
    "all cuts": SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05),
    "repetition": SamplingParams(repetition_penalty=3.0),
    "presence": SamplingParams(presence_penalty=4.0),
    "frequency": SamplingParams(frequency_penalty=2.5),
    "negative penalties": SamplingParams(
        repetition_penalty=0.5, presence_penalty=-2.0, frequency_penalty=-1.0
    ),
    "bias": SamplingParams(logit_bias=((3, 9.0), (50, -2.0), (100, 8.5))),
    "bias of repeated tokens": SamplingParams(
        repetition_penalty=3.0, logit_bias=((8, 9.0), (9, 9.0), (50, 5.0))
    ),
    "everything": SamplingParams(
        temperature=1.2,
        top_k=30,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias=((3, 4.0), (7, float("-inf"))),
    ),
}


def rows_with(options: SamplingParams, dtype: np.dtype, count: int = SLOTS) -> list[Row]:
    """Rows that differ in all they may differ in; favourites are among what was given and generated."""
    rows = []
    for i, logits in enumerate(random_logits(dtype, rows=count)):
        best = np.argsort(-logits)[:4].tolist()
        rows.append(
            Row(
                logits=logits,
                sampling=replace(options, seed=i << 31),
                path=((0, i), (2, 1))[: i % 3],
                position=100 + i,
                given=(best[3], 8),
                generated=(best[0], best[0], best[1], 9)[: i % 5],
                fed=best[2] if i % 2 else None,
            )
        )
    return rows
