"""Positions and sight of answers with branches, by hand and against a plain walk over the tree."""

from __future__ import annotations

from itertools import compress

import jax.numpy as jnp
import numpy as np
import pytest

from model.tiny import dense
from model.tiny.layout import CONCLUSION_OPEN, PATH_OPEN, Tokens, lay_out, pack
from model.tiny.lessons import sequence
from model.tiny.tasks import Answer, Fork, write_task
from scheduler.grammars import MULTIVERSE


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


ANSWER = ("ab", Fork({"1": ("c",), "2": ("def",)}), "g")
SEED = len(PATH_OPEN.format(label="1"))
JOIN = len(CONCLUSION_OPEN)


def seen(sequence: Tokens) -> np.ndarray:
    rows = pack([sequence], len(sequence.tokens))
    return np.asarray(dense.sight(jnp.asarray(rows.document), jnp.asarray(rows.branch)))[0]


def test_paths_begin_together_and_the_conclusion_after_the_longest():
    out = lay_out("??", ANSWER, letters)
    paths = [*range(4, 4 + SEED + 1), *range(4, 4 + SEED + 3)]
    join = 4 + SEED + 3
    assert out.positions == [0, 1, 2, 3, *paths, *range(join, join + JOIN + 1 + len("<|im_end|>"))]


def test_the_model_has_to_say_all_but_the_prompt_and_the_servers_own_text():
    out = lay_out("??", ANSWER, letters)
    said = "".join(chr(token) for token, learned in zip(out.tokens, out.learned, strict=True) if learned)
    assert said == "abcdefg<|im_end|>"


def test_the_servers_own_text_is_multiverses():
    assert MULTIVERSE.branch_open == PATH_OPEN
    assert MULTIVERSE.join_open == CONCLUSION_OPEN


@pytest.mark.parametrize(
    ("rule", "second", "join"),
    [
        ("sequential", 4 + SEED + 1, 4 + 2 * SEED + 4),
        ("join at the fork", 4, 4),
        ("join after the sum", 4, 4 + 2 * SEED + 4),
        ("seeing", 4, 4 + SEED + 3),
    ],
)
def test_each_broken_rule_breaks_one_thing(rule, second, join):
    out = lay_out("??", ANSWER, letters, rule)
    start = 4 + SEED + 1
    assert out.positions[start] == second
    assert out.positions[start + SEED + 3] == join
    assert seen(out)[start, 4] == (rule == "seeing")


def walk(answer: Answer, context: list[int], count: int, mask: np.ndarray) -> tuple[list[int], int]:
    """Marks what each token sees, by keeping the list of what came before; returns it and the next index."""

    def say(text: str, context: list[int], count: int) -> tuple[list[int], int]:
        for _ in text:
            context = [*context, count]
            mask[count, context] = True
            count += 1
        return context, count

    for part in answer:
        if isinstance(part, str):
            context, count = say(part, context, count)
            continue
        joined = list(context)
        for label, path in part.branches.items():
            own, count = say(PATH_OPEN.format(label=label), context, count)
            own, count = walk(path, own, count, mask)
            joined += own[len(context) :]
        context, count = say(CONCLUSION_OPEN, joined, count)
    return context, count


def test_sight_is_that_of_the_tree_for_every_kind_of_question():
    kinds = {}
    for index in range(30):
        task = write_task(5, index)
        kinds[task.kind] = task
    assert len(kinds) == 10
    for task in kinds.values():
        out = lay_out("", task.answer, letters)
        mask = np.zeros((len(out.tokens),) * 2, bool)
        walk((*task.answer, "<|im_end|>"), [], 0, mask)
        np.testing.assert_array_equal(seen(out), mask)


def test_packed_sequences_do_not_see_each_other_and_keep_their_targets():
    sequences = [sequence(write_task(5, index)) for index in range(9)]
    rows = pack(sequences, 1024)
    sight = np.asarray(dense.sight(jnp.asarray(rows.document), jnp.asarray(rows.branch)))
    other = rows.document[:, :, None] != rows.document[:, None, :]
    assert not (sight & other).any()
    for number, one in enumerate(sequences, 1):
        row, at = np.nonzero(rows.document == number)
        assert rows.tokens[row, at].tolist() == one.tokens
        targets = rows.target[row, at]
        assert targets[targets >= 0].tolist() == list(compress(one.tokens, one.learned))
