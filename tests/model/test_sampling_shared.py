"""Devices that share a vocabulary choose what one device would choose, and count the same."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
import pytest

from model.sampling import (
    NO_TOKEN,
    USES_ALL,
    USES_RANDOM,
    USES_TOP,
    SampleInputs,
    SampleOutputs,
    SlotState,
    assign,
    count_history,
    pack_assignments,
    sample,
)
from model.sharding import EVERYWHERE, ON_ONE_DEVICE, Placement
from scheduler.sampling import SamplingParams
from tests.model.meshes import divisible
from tests.model.noise import noise

pytestmark = pytest.mark.usefixtures("quick_compiler")

MAX_BIAS, TOP = 3, 5
OPTIONS = [
    SamplingParams(),
    SamplingParams(logprobs=True, top_logprobs=TOP),
    SamplingParams(temperature=1.0, seed=5),
    SamplingParams(temperature=2.0, top_k=7, seed=6),
    SamplingParams(temperature=1.3, top_p=0.6, seed=2**63 + 7, logprobs=True),
    SamplingParams(temperature=1.3, top_p=1e-30, seed=8),
    SamplingParams(temperature=1e-30, min_p=0.2, seed=9),
    SamplingParams(temperature=0.9, top_k=2**31 - 1, top_p=0.9, min_p=1.0, seed=10),
    SamplingParams(temperature=1.1, logit_bias=((0, 3.0), (70, -100.0), (135, 4.0)), seed=11),
    SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.7),
]


def full(value: int) -> Any:
    """A parameter that is tried before a release."""
    return pytest.param(value, marks=pytest.mark.full)


class Sampler:
    """Slots of `options` over `count` devices, and the programs that change them."""

    def __init__(
        self, count: int, vocab: int, options: list[SamplingParams], uses: int, known: set[int] | None = None
    ) -> None:
        self.placement = Placement.over(divisible(2, vocab_size=vocab), count) if count > 1 else ON_ONE_DEVICE
        slots, peers = len(options), self.placement.vocab_peers
        self.programs: dict[Any, Any] = {}
        self.history = partial(count_history, peers=peers)
        self.sample = partial(sample, uses=uses, max_top_logprobs=TOP, peers=peers)
        self.slots = SlotState.create(slots, vocab, MAX_BIAS, known, self.placement)
        packed = pack_assignments(
            [*enumerate(options)], capacity=slots, slots=slots, vocab=vocab, max_bias=MAX_BIAS
        )
        self.slots = self.run(assign, self.slots, packed)

    def run(self, change: Any, *arguments: Any, results: Any = None) -> Any:
        if change not in self.programs:
            program = self.placement.program(change, arguments, self.slots if results is None else results)
            self.programs[change] = jax.jit(program)
        return self.programs[change](*arguments)

    def count(self, slot: int, ids: list[int], *, generated: bool) -> None:
        arguments = np.int32(slot), np.array(ids, np.int32), np.int32(len(ids)), np.bool_(generated)
        self.slots = self.run(self.history, self.slots, *arguments)

    def choose(self, logits: np.ndarray, fed: np.ndarray) -> SampleOutputs:
        every = np.arange(len(logits), dtype=np.int32)
        inputs = SampleInputs(every, every, every + 20, every + 7, np.ones_like(every))
        divided = jax.device_put(logits, self.placement.sharding([None, "vocab"]))
        results = self.slots, EVERYWHERE
        self.slots, outputs = self.run(self.sample, divided, fed, self.slots, inputs, results=results)
        return jax.tree.map(np.asarray, outputs)


def random_logits(vocab: int, *, ties: bool) -> np.ndarray:
    drawn = 3 * np.random.default_rng(vocab).normal(size=(len(OPTIONS), vocab))
    return (np.round(drawn) if ties else drawn).astype(np.float32)


@lru_cache
def chosen(count: int, uses: int) -> tuple[list[SampleOutputs], SlotState]:
    """What two steps choose, the second one among many equally likely tokens; and the slots after them."""
    sampler = Sampler(count, 136, OPTIONS, uses, known=set(range(3, 131)))
    for slot in range(len(OPTIONS)):
        sampler.count(slot, [slot, 40 + slot, 135], generated=False)
        sampler.count(slot, [50 + slot, 50 + slot, 90], generated=True)
    fed = np.arange(len(OPTIONS), dtype=np.int32) * 13
    outputs = [sampler.choose(random_logits(136, ties=ties), fed) for ties in (False, True)]
    return outputs, jax.tree.map(np.asarray, sampler.slots)


@pytest.mark.parametrize("uses", [full(0), full(USES_RANDOM | USES_TOP), USES_ALL])
@pytest.mark.parametrize("count", [2, full(4), 8])
def test_devices_that_share_a_vocabulary_choose_as_one(count: int, uses: int) -> None:
    (alone, slots_alone), (shared, slots) = chosen(1, uses), chosen(count, uses)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(other.token, one.token)
        np.testing.assert_array_equal(other.top_id, one.top_id)
        np.testing.assert_allclose(other.logprob, one.logprob, rtol=1e-5)
        np.testing.assert_allclose(other.top_logprob, one.top_logprob, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, slots, slots_alone)


@pytest.mark.parametrize("uses", [0, USES_ALL])
def test_devices_that_share_a_vocabulary_know_what_is_no_number(uses: int) -> None:
    sampler, logits = Sampler(2, 136, OPTIONS, uses), random_logits(136, ties=False)
    logits[1, 5] = logits[2, 130] = np.nan
    chosen = sampler.choose(logits, np.zeros(len(OPTIONS), np.int32)).token
    assert [*np.flatnonzero(chosen == NO_TOKEN)] == [1, 2]


# --- a real vocabulary --------------------------------------------------------------------------------------

VOCAB = 151_936
FLAT = [
    SamplingParams(temperature=2.0, top_p=0.5, seed=1),
    SamplingParams(temperature=2.0, top_k=40_000, top_p=0.9, seed=2),
    SamplingParams(temperature=2.0, min_p=0.8, seed=3),
]


def nucleus(logits: np.ndarray, options: SamplingParams) -> np.ndarray:
    """The tokens that the options leave, by sorting. [vocab] of bool"""
    scaled = (logits - logits.max()) / options.temperature
    order = np.argsort(-scaled, kind="stable")
    mass = np.exp(scaled[order])
    count = options.top_k or len(mass)
    count = min(count, int(np.searchsorted(np.cumsum(mass[:count]), options.top_p * mass[:count].sum())) + 1)
    return (scaled >= scaled[order[count - 1]]) & (np.exp(scaled) >= options.min_p)


@pytest.mark.parametrize("count", [full(1), full(2), 8])
def test_a_nucleus_of_tens_of_thousands_is_cut_exactly(count: int, x64: None) -> None:
    logits = 0.1 * np.random.default_rng(0).normal(size=(len(FLAT), VOCAB))
    sampler = Sampler(count, VOCAB, FLAT, USES_RANDOM | USES_TOP)
    outputs = sampler.choose(logits, np.zeros(len(FLAT), np.int32))
    for row, options in enumerate(FLAT):
        kept = nucleus(logits[row], options)
        assert kept.sum() > 20_000
        # What is drawn is the best of the kept tokens' logits with the sample's own noise.
        drawn = logits[row] / options.temperature + noise(options.seed, row + 20, row + 7, VOCAB)
        assert outputs.token[row] == np.where(kept, drawn, -np.inf).argmax()
