"""What a slot keeps from step to step: its options, its counts and its last token."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from model.sampling import SampleInputs, SlotState, pack_assignments, sample
from scheduler.sampling import OPTIONS, SamplingParams
from tests.model.sampled_rows import (
    GREEDY,
    MAX_BIAS,
    SLOTS,
    TOP,
    VOCAB,
    WARM,
    Row,
    choose,
    prepare,
    random_logits,
    run_assign,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")


def test_the_chosen_token_becomes_the_slots_last_and_padding_writes_nowhere(dtype):
    rows = [Row(logits=logits, fed=11) for logits in random_logits(dtype, rows=2)]
    state, outputs = choose(rows, slots=[4, 9])
    last = np.zeros(SLOTS, np.int32)
    last[[4, 9]] = outputs.token
    np.testing.assert_array_equal(state.last_token, last)
    counts = np.zeros((SLOTS, VOCAB), np.int32)
    counts[[4, 9], 11] = 1
    np.testing.assert_array_equal(state.generated_count, counts)


def test_a_new_assignment_forgets_the_counts_and_leaves_other_slots_alone():
    row = Row(logits=random_logits(np.dtype("float32"))[0], given=(1, 2), generated=(3, 3))
    state = prepare([row, row], [2, 5])
    packed = pack_assignments([(2, WARM)], capacity=3, slots=SLOTS, vocab=VOCAB, max_bias=MAX_BIAS)
    state = run_assign(state, packed)
    assert not np.any(state.given_seen[2])
    assert not np.any(state.generated_count[2])
    assert np.flatnonzero(state.given_seen[5]).tolist() == [1, 2]
    assert state.generated_count[5, 3] == 2
    np.testing.assert_allclose(np.asarray(state.options["temperature"])[[2, 5]], [0.8, 0])
    assert state.seed[2].tolist() == [0, 3]


def test_every_option_reaches_its_slot_and_padding_reaches_none():
    values = {option.name: option.off + 1 + i for i, option in enumerate(OPTIONS)}
    state = prepare(
        [Row(logits=random_logits(np.dtype("float32"))[0], sampling=SamplingParams(**values))], [7]
    )
    for option in OPTIONS:
        column = np.full(SLOTS, option.off, state.options[option.name].dtype)
        column[7] = values[option.name]
        np.testing.assert_array_equal(state.options[option.name], column)
        assert np.issubdtype(column.dtype, np.integer) == isinstance(option.off, int)


def test_an_assignment_beyond_its_capacity_is_refused():
    def pack(sampling: SamplingParams, count: int):
        pairs = [(i, sampling) for i in range(count)]
        return pack_assignments(pairs, capacity=2, slots=SLOTS, vocab=VOCAB, max_bias=1)

    with pytest.raises(ValueError, match="3 slots to assign in one call, at most 2"):
        pack(GREEDY, 3)
    with pytest.raises(ValueError, match="2 logit biases in one request, at most 1"):
        pack(SamplingParams(logit_bias=((1, 1.0), (2, 1.0))), 1)


def test_a_donated_state_is_updated_in_place():
    state = SlotState.create(SLOTS, VOCAB, MAX_BIAS)
    ids = np.zeros(2, np.int32)
    inputs = SampleInputs(ids, ids, ids, ids, ids)
    before = [state.last_token, state.generated_count]
    addresses = [array.unsafe_buffer_pointer() for array in before]
    donating = jax.jit(partial(sample, uses=0, max_top_logprobs=TOP), donate_argnums=2)
    after, _ = donating(np.zeros((2, VOCAB), np.float32), ids, state, inputs)
    assert [
        after.last_token.unsafe_buffer_pointer(),
        after.generated_count.unsafe_buffer_pointer(),
    ] == addresses
    assert all(array.is_deleted() for array in before)
