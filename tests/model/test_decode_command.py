"""`taper-decode`, against transformers' goldens; and what it says of a command that it cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import tyro

from model.decode_command import Decode, _continuation, main
from model.sharding import Placement, PlacementError
from model.version import versions
from scheduler.sampling import OPTIONS, SamplingParams
from tests.families import FAMILIES, family
from tests.model.checkpoints import CHECKPOINTS, GREEDY_TOKENS, Golden
from tests.sizes import sampled

pytestmark = pytest.mark.usefixtures("quick_compiler")


def run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    main(list(options))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sampled(CHECKPOINTS, ["qwen3-gqa1-tied"]))
def test_the_command_goes_on_as_transformers_does(
    name: str, golden_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    continuations = Golden.load(name).continuations(CHECKPOINTS[name])
    prompts = [word for prompt, _ in continuations for word in ("--prompt-ids", ",".join(map(str, prompt)))]
    dtype = "float64" if name == "qwen3-gqa1-tied" else "float32"
    length = str(GREEDY_TOKENS)
    folder = str(golden_folder(name))
    out = run(capsys, "--model", folder, *prompts, "--max-tokens", length, "--dtype", dtype, "--json")
    answers = [prompt["branches"][0]["token_ids"] for prompt in json.loads(out)["prompts"]]
    assert answers == [expected for _, expected in continuations]


@pytest.mark.full
def test_json_has_ids_and_text_of_every_branch(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max-tokens", "5", "--branches", "2", "--temperature", "0.9", "--seed", "3", "--ignore-eos")
    prompts = ("--prompt", "The sun", "--prompt", "A", "--prompt-ids", "5,6,7")
    answer = json.loads(run(capsys, *prompts, *options, "--json"))
    assert list(answer) == ["prompts", "tokens_per_second"]
    assert [list(prompt) for prompt in answer["prompts"]] == [["branches"]] * 3
    branches = [branch for prompt in answer["prompts"] for branch in prompt["branches"]]
    assert [list(branch) for branch in branches] == [["token_ids", "text"]] * 6
    assert [len(branch["token_ids"]) for branch in branches] == [5] * 6
    assert all(branch["text"] for branch in branches)
    text = run(capsys, *prompts, *options)
    assert all(branch["text"] in text for branch in branches)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_continuation_is_what_its_ids_add_to_the_text_of_the_prompt(name: str) -> None:
    tokenizer = family(name)
    prompt, ids = tokenizer.encode("the", add_special_tokens=True), tokenizer.encode_continuation(" cat")
    assert _continuation(tokenizer, prompt, ids) == " cat"
    assert _continuation(tokenizer, prompt, []) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--prompt"),
        (["--prompt-ids", "1,x"], "numbers with commas"),
        (["--prompt-ids", "1,269"], "token 269 is not in the model's vocabulary of 269"),
        (["--prompt-ids", "-1"], "token -1 is not in"),
        (["--prompt", "a", "--attention", "magic"], "auto or one of reference, xla"),
        (["--prompt", "a", "--model", "nowhere"], "no model"),
        (["--prompt", "a", "--page-size", "0"], "a page needs at least one position, not 0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature: 0 to 100 are possible, got nan"),
        (["--prompt", "a", "--temperature", "1e-9"], "temperature: 0 .greedy. or 0.01 to 100"),
        (["--prompt", "a", "--top-p", "0"], "top_p: must be more than 0"),
        (["--prompt", "a", "--top-k", "-1"], "top_k: 0 or more is possible, got -1"),
        (
            ["--prompt", "a", "--logit-bias", "5", "nan"],
            r"logit_bias\[5\]: -100 to 100 are possible, got nan",
        ),
        (["--prompt", "a", "--logit-bias", "269", "1"], r"logit_bias\[269\]: the id is not less than 269"),
        (
            ["--prompt", "a", "--weights-seed", str(2**32)],
            "seed of random weights must be from 0 to 4294967295",
        ),
        (["--prompt", "a", "--seed", "-1"], "seed: a seed has 64 bits"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(options)


@pytest.mark.parametrize("asked", [True, False])
def test_two_gpus_reach_each_others_memory_if_they_are_told_to(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = MagicMock(side_effect=PlacementError("there is one"))
    monkeypatch.setattr(Placement, "over", over)
    with pytest.raises(SystemExit, match="there is one"):
        main(["--prompt", "a", "--tensor-parallel", "2", *(["--peer-memory"] if asked else [])])
    assert over.call_args.args[1:] == (2,)
    assert over.call_args.kwargs == {"peer_memory": asked}


def test_the_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"{versions()}\n"


def test_a_folder_without_a_tokenizer_takes_ids_only(golden_folder: Callable[[str], Path]) -> None:
    with pytest.raises(SystemExit, match="--prompt-ids"):
        main(["--model", str(golden_folder("qwen3-gqa1-tied")), "--prompt", "a"])


def test_every_number_among_the_sampling_options_is_a_flag_and_off_by_default() -> None:
    given = {option.name: option.off + 1 for option in OPTIONS}
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    taken, untouched = tyro.cli(Decode, args=flags).sampling, tyro.cli(Decode, args=[]).sampling
    assert {name: getattr(taken, name) for name in given} == given
    assert all(getattr(untouched, name) == getattr(SamplingParams(), name) for name in given)
