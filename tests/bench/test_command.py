from __future__ import annotations

import shlex

from bench.command import Command, floats, ints, names, split


def test_the_command_as_typed_is_one_that_a_shell_takes_again() -> None:
    words = ["--workload", "my file.json", "--", "--model", "it's"]
    typed = Command("bench.load.goodput", "").typed(words)
    assert typed.startswith("python -m bench.load.goodput --workload 'my file.json' -- --model ")
    assert shlex.split(typed) == ["python", "-m", "bench.load.goodput", *words]


def test_every_command_says_where_its_result_goes() -> None:
    assert Command("bench.x", "").parse_args(["--json", "-"]).json == "-"
    assert Command("bench.x", "").parse_args([]).json is None


def test_a_servers_arguments_follow_the_first_dashes() -> None:
    assert split(["--seed", "1", "--", "--model", "m", "--", "x"]) == (
        ["--seed", "1"],
        ["--model", "m", "--", "x"],
    )
    assert split(["--seed", "1"]) == (["--seed", "1"], [])


def test_lists_have_commas() -> None:
    assert (floats("1,2.5"), ints("3"), names("off,cap:4")) == ([1.0, 2.5], [3], ["off", "cap:4"])


def test_two_gpus_reach_each_others_memory_unless_they_are_told_not_to() -> None:
    parser = Command("bench.x", "")
    parser.add_tensor_parallel()
    assert parser.parse_args([]).peer_memory
    assert not parser.parse_args(["--no-peer-memory"]).peer_memory
