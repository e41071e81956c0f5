"""The questions of the default model and their right answers."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from model.tiny.lessons import sequence, tokenizer
from model.tiny.measure import HELD_OUT_SEED
from model.tiny.tasks import OPERATIONS, WORDS, Fork, Task, reserved, transcript, write_task

TASKS = [write_task(3, index) for index in range(300)]


def conclusion(task: Task) -> str:
    return transcript(task.answer)[()].rpartition("</Goal>")[2].removesuffix("</Conclusion></Parallel>")


def find(pattern: str) -> list[tuple[Task, re.Match[str]]]:
    found = [(task, re.search(pattern, task.question)) for task in TASKS if task.kind != "nested"]
    return [(task, match) for task, match in found if match]


def listed(text: str) -> list[str]:
    return re.split(", | and ", text)


def test_a_question_follows_from_its_seed_and_index():
    assert [write_task(3, index) for index in range(20)] == TASKS[:20]
    assert write_task(4, 0) != write_task(3, 0)
    assert write_task(1, 38).question == "Add: 4+4, 6+5. What is the total?"


def test_reversing():
    for task, match in find(r"(?:Reverse each word|Reverse these words|backwards): ([^.]+)\.$"):
        words = listed(match[1])
        if len(words) > 1:
            assert conclusion(task) == ", ".join(word[::-1] for word in words)
            work = transcript(task.answer)[("1",)]
            assert work.endswith(f" = {words[0][::-1]}</Path>")
    assert OPERATIONS["reverse"].do("cat").work == "cat: c1 a2 t3 -> t3 a2 c1"


def test_sorting_keeps_equal_letters_in_order():
    step = OPERATIONS["sort"].do("banana")
    assert (step.work, step.result) == ("banana: b1 a2 n3 a4 n5 a6 -> a2 a4 a6 b1 n3 n5", "aaabnn")


def test_counting_vowels_counts_along():
    step = OPERATIONS["vowels"].do("apple")
    assert (step.work, step.result) == ("apple: a1 p1 p1 l1 e2", "2")


def test_looking_up_uses_the_table_of_the_question():
    found = find(r"^\w+: ([^.]+)\. Look up[^:]*: ([^.]+)\.")
    assert found
    for task, match in found:
        table = dict(entry.split() for entry in match[1].split(", "))
        said = transcript(task.answer)
        for number, item in enumerate(listed(match[2]), 1):
            assert said[(str(number),)] == f" {item} = {table[item]}</Path>"


@pytest.mark.parametrize(
    ("asked", "shown", "answer"),
    [
        ("total", r"\((\d+)\)", lambda figures, items: str(sum(figures))),
        ("largest", r"= (\d+) ", lambda figures, items: items[figures.index(max(figures))]),
        ("odd one out", r"= (\d+)", lambda figures, items: next(
            item for item, figure in zip(items, figures, strict=True) if figures.count(figure) == 1
        )),
    ],
)  # fmt: skip
def test_conclusions_follow_from_the_results(asked, shown, answer):
    found = [task for task in TASKS if task.kind != "nested" and f"; {asked} " in conclusion(task)]
    assert found
    for task in found:
        said = transcript(task.answer)
        paths = [said[(str(number),)] for number in range(1, len(said))]
        figures = [int(re.search(r"= (\d+)</Path>", path)[1]) for path in paths]
        items = [re.match(r" ([^:= ]+)", path)[1] for path in paths]
        assert conclusion(task).endswith(f"; {asked} {answer(figures, items)}")


def test_the_longest_is_the_only_one_of_its_length():
    found = [task for task in TASKS if task.kind != "nested" and "; longest " in conclusion(task)]
    assert found
    for task in found:
        results, _, answer = conclusion(task).partition("; longest ")
        words = [entry.split()[0] for entry in results.split(", ")]
        assert [word for word in words if len(word) >= len(answer)] == [answer]


def test_questions_about_one_item_are_answered_without_a_fork():
    serial = [task for task in TASKS if task.kind == "serial"]
    assert serial
    assert all(len(task.answer) == 1 and "<" not in task.answer[0] for task in serial)


def test_nested_questions_fork_in_their_branches():
    for task in TASKS:
        depth = max(len(name) for name in transcript(task.answer))
        assert depth == {"serial": 0, "nested": 2}.get(task.kind, 1)


def test_branches_of_one_question_differ_in_length():
    spread = []
    for task in TASKS:
        lengths = [len(text) for name, text in transcript(task.answer).items() if name]
        spread.append(max(lengths, default=0) - min(lengths, default=0))
    assert sorted(spread)[len(spread) // 2] > 20
    assert max(spread) > 60


def test_all_kinds_and_two_to_eight_items_occur():
    assert len(Counter(task.kind for task in TASKS)) == 10
    forks = [part for task in TASKS for part in task.answer if isinstance(part, Fork)]
    assert {len(fork.branches) for fork in forks} == set(range(2, 9))


def test_reserved_words_occur_in_held_out_questions_only():
    secret = {word for word in WORDS if reserved(word)}
    assert 0.15 < len(secret) / len(WORDS) < 0.3
    shown = {word for task in TASKS for word in re.findall(r"\b[a-z]+\b", task.question)}
    held_out = [write_task(HELD_OUT_SEED, index, held_out=True) for index in range(100)]
    asked = {word for task in held_out for word in re.findall(r"\b[a-z]+\b", task.question)}
    assert not shown & secret - {"up"}  # as in "look up"
    assert len(asked & secret) > 30


def test_a_question_with_its_answer_fits_into_a_row():
    assert max(len(sequence(task).tokens) for task in TASKS) <= 1024


def test_seeds_and_sampled_text_are_tokenized_as_one_text_would_be():
    codec = tokenizer()
    assert codec.encode("\n<Path>\n1: cat") == codec.encode("\n<Path>\n1:") + codec.encode(" cat")
