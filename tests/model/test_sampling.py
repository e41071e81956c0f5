"""Choosing tokens: each option against a few lines of NumPy, and what a choice may not depend on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import or_

import jax
import numpy as np
import pytest

from model.sampling import (
    NO_TOKEN,
    SAMPLERS,
    USES_ALL,
    USES_BIAS,
    USES_LOGPROBS,
    USES_PENALTIES,
    USES_RANDOM,
    USES_TOP,
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
from scheduler.sampling import OPTIONS, SamplingParams
from tests.model.noise import noise

pytestmark = pytest.mark.usefixtures("quick_compiler")

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


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield np.dtype("float64")


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


@pytest.mark.parametrize(
    "options", [SamplingParams(temperature=0.9), SamplingParams(temperature=1.4, top_p=0.8)]
)
def test_draws_follow_the_distribution(options, dtype):
    logits = few(random_logits(dtype, seed=4)[0, :11] / 2, dtype)
    draws = 8 * MANY
    rows = [Row(logits=logits, sampling=replace(options, seed=77), position=i) for i in range(draws)]
    seen = [token for i in range(8) for token in tokens_of_one_slot(rows[i::8])]
    kept = [token for token in kept_tokens(logits, options) if np.isfinite(logits[token])]
    chances = np.exp(logits[kept] / options.temperature)
    wanted = draws * chances / chances.sum()
    counts = np.bincount(seen, minlength=logits.size)
    assert counts.sum() == counts[kept].sum()
    chi_square = ((counts[kept] - wanted) ** 2 / wanted).sum()
    freedom = len(kept) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_the_same_seed_path_and_position_draw_the_same_token(dtype):
    rows = [Row(logits=row, sampling=WARM, path=((1, 2),)) for row in random_logits(dtype, rows=6)]
    assert tokens(rows) == tokens(rows)


@pytest.mark.parametrize(
    "change",
    [
        {"position": 8},
        {"path": ((0, 1),)},
        {"path": ((1, 0),)},
        {"path": ((0, 0), (0, 0))},
        {"sampling": replace(WARM, seed=4)},
        {"sampling": replace(WARM, seed=3 + 2**32)},
        {"sampling": replace(WARM, seed=3 + 2**63)},
    ],
)
def test_another_seed_path_or_position_draws_anew(change):
    flat = np.zeros(VOCAB, np.float32)
    rows = [Row(logits=flat, sampling=WARM, path=((0, 0),), position=7 + 100 * i) for i in range(10)]
    changed = [replace(row, **change) for row in rows]
    if "position" in change:
        changed = [replace(row, position=row.position + 1) for row in rows]
    assert sum(a == b for a, b in zip(tokens(rows), tokens(changed), strict=True)) <= 2


def test_the_same_seed_draws_the_same_noise_in_every_dtype():
    chosen = []
    for name in ("float32", "float64"):
        with jax.enable_x64(name == "float64"):
            chosen.append(tokens([replace(row, sampling=WARM) for row in rows_with(WARM, np.dtype(name))]))
    assert chosen[0] == chosen[1]


def test_a_choice_ignores_batch_size_padding_slots_and_the_other_rows(float64):
    rows = [replace(rows_with(options, float64)[i], position=i) for i, options in enumerate(CASES.values())]
    alone = [tokens([row], slots=[3], samples=1)[0] for row in rows]
    shuffle = np.random.default_rng(5)
    order = shuffle.permutation(len(rows))
    together = tokens([rows[i] for i in order], slots=shuffle.permutation(SLOTS).tolist(), samples=33)
    assert together == [alone[i] for i in order]


def test_branch_keys_are_the_same_in_another_process():
    paths = [(), ((0, 0),), ((0, 1),), ((1, 0),), ((0, 1), (2, 3)), ((0, 1), (3, 2))]
    keys = [branch_key(path) for path in paths]
    assert len(set(keys)) == len(paths)
    assert all(-(2**31) <= key < 2**31 for key in keys)
    program = f"from model.sampling import branch_key; print([branch_key(path) for path in {paths}])"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(keys)


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


def test_the_chosen_token_becomes_the_slots_last_and_padding_writes_nowhere(dtype):
    rows = [Row(logits=logits, fed=11) for logits in random_logits(dtype, rows=2)]
    state, outputs = choose(rows, slots=[4, 9])
    last = np.zeros(SLOTS, np.int32)
    last[[4, 9]] = outputs.token
    np.testing.assert_array_equal(state.last_token, last)
    counts = np.zeros((SLOTS, VOCAB), np.int32)
    counts[[4, 9], 11] = 1
    np.testing.assert_array_equal(state.generated_count, counts)


def test_a_fed_token_counts_before_the_choice(dtype):
    logits = few([5, 4, 3], dtype)
    shy = SamplingParams(presence_penalty=2.0)
    assert tokens([Row(logits=logits, sampling=shy), Row(logits=logits, sampling=shy, fed=0)]) == [0, 1]


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
