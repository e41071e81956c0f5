"""Drawing at random: by the distribution, and by seed, path and position alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from model.sampling import branch_key
from scheduler.sampling import SamplingParams
from tests.model.sampled_rows import (
    CASES,
    MANY,
    SLOTS,
    VOCAB,
    WARM,
    Row,
    few,
    kept_tokens,
    random_logits,
    rows_with,
    tokens,
    tokens_of_one_slot,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield np.dtype("float64")


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
