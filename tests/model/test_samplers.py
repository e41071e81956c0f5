"""The cheapest program that suffices samples, and chooses what one with more options would."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from model.sampling import (
    SAMPLERS,
    USES_ALL,
    USES_BIAS,
    USES_LOGPROBS,
    USES_PENALTIES,
    USES_RANDOM,
    USES_TOP,
    SampleInputs,
    SlotState,
    sample,
    sampler_for,
    uses_of,
)
from scheduler.sampling import SamplingParams
from tests.model.sampled_rows import GREEDY, MAX_BIAS, SLOTS, TOP, VOCAB, WARM, Row, random_logits, tokens

pytestmark = pytest.mark.usefixtures("quick_compiler")


def test_what_a_slot_uses():
    assert uses_of(GREEDY) == 0
    assert uses_of(SamplingParams(top_k=3, top_p=0.5)) == 0
    assert uses_of(WARM) == USES_RANDOM
    assert uses_of(replace(WARM, min_p=0.1)) == USES_RANDOM | USES_TOP
    assert uses_of(SamplingParams(presence_penalty=-1.0)) == USES_PENALTIES
    assert uses_of(SamplingParams(logit_bias=((0, 0.0),), logprobs=True)) == USES_BIAS | USES_LOGPROBS


def test_the_cheapest_sampler_that_suffices_is_taken():
    assert sampler_for(0) == 0
    assert sampler_for(USES_RANDOM) == USES_RANDOM | USES_TOP
    assert sampler_for(USES_RANDOM | USES_TOP) == USES_RANDOM | USES_TOP
    assert {sampler_for(USES_LOGPROBS), sampler_for(USES_BIAS), sampler_for(USES_PENALTIES)} == {USES_ALL}


@pytest.mark.parametrize("sampling", [GREEDY, WARM, replace(WARM, top_p=0.7), replace(WARM, top_k=9)])
def test_a_sampler_with_more_options_chooses_the_same(sampling, dtype):
    rows = [
        Row(logits=logits, sampling=sampling, position=i)
        for i, logits in enumerate(random_logits(dtype, rows=8))
    ]
    chosen = tokens(rows)
    for sampler in SAMPLERS:
        if uses_of(sampling) & ~sampler == 0:
            assert tokens(rows, sampler=sampler) == chosen


def test_a_greedy_batch_only_looks_for_the_best_and_counts_what_was_fed():
    state = SlotState.abstract(SLOTS, VOCAB, MAX_BIAS)
    ids = jax.ShapeDtypeStruct((3,), np.int32)
    inputs = SampleInputs(ids, ids, ids, ids, ids)
    logits = jax.ShapeDtypeStruct((3, VOCAB), np.float32)
    program = jax.make_jaxpr(partial(sample, uses=0, max_top_logprobs=TOP))(logits, ids, state, inputs)
    heavy = [
        equation.params.get("name", equation.primitive.name)
        for equation in program.eqns
        if any(VOCAB in getattr(value.aval, "shape", ()) for value in equation.invars)
    ]
    assert sorted(heavy) == ["_where", "argmax", "scatter-add", "take_along_axis"], "one number is taken"
