"""Choosing tokens: each option against a few lines of NumPy, and its edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model.sampling import NO_TOKEN
from scheduler.sampling import SamplingParams
from tests.model.sampled_rows import (
    CASES,
    GREEDY,
    SLOTS,
    TOP,
    VOCAB,
    Row,
    choose,
    expected,
    few,
    random_logits,
    rows_with,
    tokens,
    tokens_of_one_slot,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_each_option_agrees_with_numpy(options, dtype):
    rows = rows_with(options, dtype)
    assert tokens(rows) == [expected(row) for row in rows]


def test_rows_with_different_options_share_a_batch(dtype):
    rows = [replace(rows_with(options, dtype)[i], position=i) for i, options in enumerate(CASES.values())]
    assert tokens(rows) == [expected(row) for row in rows]


@pytest.mark.parametrize(
    ("cuts", "survivors"),
    [
        (SamplingParams(temperature=1.0, top_k=0), 101),
        (SamplingParams(temperature=1.0, top_k=1), 1),
        (SamplingParams(temperature=1.0, top_k=3), 3),
        (SamplingParams(temperature=1.0, top_k=1000), 101),
        (SamplingParams(temperature=1.0, top_k=2**40), 101),
        (SamplingParams(temperature=1.0, top_p=1e-30), 1),
        (SamplingParams(temperature=1.0, top_p=1e-39), 1),
        (SamplingParams(temperature=1.0, top_p=5e-324), 1),
        (SamplingParams(temperature=1.0, top_p=0.999999), 101),
        (SamplingParams(temperature=1.0, min_p=1.0), 1),
        (SamplingParams(temperature=1e-30), 1),
        (SamplingParams(temperature=1e-40, top_k=5, top_p=0.5, min_p=1e-40), 1),
    ],
)
def test_a_cut_at_its_edge_keeps_what_it_should(cuts, survivors, dtype):
    likeliest_first = np.roll(np.arange(VOCAB), 7)  # no cut may leave nothing, which would choose token 0
    logits = np.empty(VOCAB, dtype)
    logits[likeliest_first] = np.linspace(0.5, 0, VOCAB)
    rows = [Row(logits=logits, sampling=cuts, position=i) for i in range(600)]
    seen = set(tokens_of_one_slot(rows))
    assert seen <= set(likeliest_first[:survivors].tolist())
    assert len(seen) > 0.9 * survivors


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(logprobs=True, top_logprobs=TOP),
        SamplingParams(temperature=50.0),
        SamplingParams(temperature=50.0, top_k=50, top_p=0.99, min_p=1e-6),
        SamplingParams(temperature=50.0, top_p=1e-39),
        SamplingParams(temperature=50.0, logit_bias=((100, 100.0),), presence_penalty=2.0),
    ],
)
def test_an_id_that_stands_for_nothing_is_never_chosen_and_never_reported(sampling, dtype):
    """A model's vocabulary is often padded; here it has a gap, too, and the padding is likeliest."""
    logits = np.linspace(-3, 3, VOCAB).astype(dtype)
    rows = [Row(logits=logits, sampling=sampling, position=i) for i in range(SLOTS)]
    known = [token for token in range(80) if token not in (40, 79)]
    _, outputs = choose(rows, known=known)
    assert set(outputs.token.tolist()) <= set(known)
    if sampling.logprobs:
        assert outputs.top_id.tolist() == [[78, 77, 76, 75, 74]] * SLOTS
        total = np.log(np.sum(np.exp(logits[known])))
        np.testing.assert_allclose(outputs.logprob, logits[78] - total, rtol=1e-5)


def test_equally_likely_tokens_are_kept_or_dropped_together(dtype):
    logits = few([1, 2, 2, 2, 0, -5, -5], dtype)
    for cut in (SamplingParams(temperature=1.0, top_k=2), SamplingParams(temperature=1.0, top_p=0.4)):
        seen = tokens_of_one_slot([Row(logits=logits, sampling=cut, position=i) for i in range(100)])
        assert set(seen) == {1, 2, 3}


def test_tokens_that_differ_in_their_last_bit_are_told_apart(dtype):
    last = np.nextafter(dtype.type(-1.5), dtype.type(-2))
    logits = few([-1.5, 0, last, -1], dtype)
    cut = SamplingParams(temperature=1.0, top_k=3)
    assert set(tokens_of_one_slot([Row(logits=logits, sampling=cut, position=i) for i in range(100)])) == {
        0,
        1,
        3,
    }


def test_an_unlikely_token_is_less_likely_when_it_is_repeated(dtype):
    """Its logit is below zero, and goes further down."""
    logits, shy = few([-1, -1.5, -5], dtype), SamplingParams(repetition_penalty=2.0)
    assert tokens([Row(logits=logits, sampling=shy), Row(logits=logits, sampling=shy, given=(0,))]) == [0, 1]


def test_a_forbidden_token_is_never_drawn(dtype):
    ban = SamplingParams(temperature=5.0, logit_bias=((1, float("-inf")),), repetition_penalty=1.5)
    logits = few([0, 4, 0.5], dtype)
    assert set(tokens_of_one_slot([Row(logits=logits, sampling=ban, position=i) for i in range(100)])) == {
        0,
        2,
    }


def test_a_row_without_any_possible_token_gives_a_token_all_the_same(dtype):
    ban = SamplingParams(temperature=1.0, top_p=0.5, min_p=0.5, top_k=2)
    row = Row(logits=np.full(VOCAB, -np.inf, dtype), sampling=ban)
    assert 0 <= tokens([row])[0] < VOCAB


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.5, top_k=9)])
@pytest.mark.parametrize("broken", [[3], range(VOCAB)])
def test_a_row_with_what_is_no_number_gives_no_token_and_says_so(sampling, broken, dtype):
    logits = np.zeros(VOCAB, dtype)
    rows = [Row(logits=logits, sampling=sampling), Row(logits=logits.copy(), sampling=sampling)]
    rows[1].logits[[*broken]] = np.nan
    sound, no_token = tokens(rows)
    assert 0 <= sound < VOCAB
    assert no_token == NO_TOKEN


def test_a_fed_token_counts_before_the_choice(dtype):
    logits = few([5, 4, 3], dtype)
    shy = SamplingParams(presence_penalty=2.0)
    assert tokens([Row(logits=logits, sampling=shy), Row(logits=logits, sampling=shy, fed=0)]) == [0, 1]


def test_log_probabilities_are_of_the_raw_logits(dtype):
    biased = SamplingParams(temperature=2.0, top_k=2, logit_bias=((6, 30.0),), logprobs=True)
    logits = random_logits(dtype, rows=3)
    outputs = choose([Row(logits=row, sampling=biased) for row in logits])[1]
    wide = logits.astype(np.float64)
    log_softmax = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    best = np.argsort(-wide, axis=1)[:, :TOP]
    np.testing.assert_array_equal(outputs.token, 6)
    np.testing.assert_allclose(outputs.logprob, log_softmax[:, 6], atol=2e-6)
    np.testing.assert_array_equal(outputs.top_id, best)
    np.testing.assert_allclose(outputs.top_logprob, np.take_along_axis(log_softmax, best, 1), atol=2e-6)
    assert outputs.logprob.dtype == outputs.top_logprob.dtype == np.float32


def test_log_probabilities_nobody_asked_for_are_zero(dtype):
    outputs = choose([Row(logits=random_logits(dtype)[0])])[1]
    assert not np.any(outputs.logprob)
    assert not np.any(outputs.top_logprob)
