"""Bounds, at the limit and one over: the context, sizes, and what is looked at of what is too large."""

from __future__ import annotations

import pytest

from serve.reading.faults import MAX_VIOLATIONS, refuse_text
from serve.reading.programs import MAX_LABEL_BYTES, MAX_SEQUENCES
from serve.reading.requests import MAX_SALT_BYTES, MAX_TURNS, read_request
from taper_client import branch, generate_request, parallel, serial
from taper_client.errors import InvalidRequestError, Violation
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.fakes import ByteTokenizer, served_model
from tests.serve.reading.messages import of, of_plan, read, violations


@pytest.mark.parametrize(
    ("prompt", "plan", "path"),
    [
        (200, None, "prompt"),
        (150, [serial([1] * 49), serial([1])], "plan.stages[1].serial.prefix"),
        (150, [parallel([branch([1] * 25), branch([1] * 25)], join="reprefill")], "plan.stages[0].parallel"),
        (
            150,
            [parallel([branch([1] * 25), branch([1] * 30), branch([1] * 25)], join="reprefill", first_k=2)],
            "plan.stages[0].parallel",
        ),
        (
            150,
            [parallel([branch([1] * 25), branch([1] * 50)], join="kv")],
            "plan.stages[0].parallel.branches[1].prefix",
        ),
    ],
)
def test_what_leaves_no_room_for_a_token_is_refused_with_limit_and_got(prompt, plan, path):
    message = generate_request([1] * prompt, plan=plan)
    with pytest.raises(InvalidRequestError) as caught:
        read_request(message, served_model())
    assert [violation.field for violation in caught.value.violations] == [path]
    assert caught.value.reason == "PROMPT_TOO_LONG"
    assert caught.value.metadata == {"limit": "199", "got": "200"}


@pytest.mark.parametrize(
    ("prompt", "plan"),
    [
        (199, None),
        (150, [serial([1] * 49)]),
        (150, [parallel([branch([1] * 24), branch([1] * 25)], join="reprefill")]),
        (149, [parallel([branch([1] * 49), branch([1] * 49)], join="kv"), serial([1])]),
        (
            150,
            [parallel([branch([1] * 25), branch([1] * 30), branch([1] * 24)], join="reprefill", first_k=2)],
        ),
        (149, [parallel([branch([1] * 49), branch([1] * 50)], join="kv", first_k=1), serial([1])]),
        (150, [parallel([branch([1] * 49), branch([1] * 49)], join="none")]),
    ],
)
def test_one_position_for_the_answer_is_room_enough(prompt, plan):
    read(generate_request([1] * prompt, plan=plan))


def test_a_large_limit_is_ended_by_the_context():
    request = read(generate_request("go", max_tokens=2**32 - 1))
    assert request.program.stages[0].stopping.max_tokens == 200


def test_ids_are_not_asked_of_whoever_has_sent_ids():
    with pytest.raises(InvalidRequestError, match="its ids have no text"):
        refuse_text(pb.DetokenizeRequest(token_ids=[1]), served_model(supports_text=False))


def turns(count: int) -> pb.GenerateRequest:
    return of(prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a")] * count)))


def stages(count: int) -> pb.GenerateRequest:
    """So many serial stages and branches, none of whose lists is too long."""
    inner = [pb.Stage(serial=pb.SerialStage())] * 63
    whole, rest = divmod(count, 64)
    branches = [pb.BranchSpec(stages=inner)] * whole
    more = [pb.Stage(serial=pb.SerialStage())] * rest
    return of_plan(pb.Stage(parallel=pb.ParallelStage(branches=branches)), *more)


def prefixes(count: int) -> pb.GenerateRequest:
    """So many tokens in the prefixes of two branches."""
    half = pb.Prefix(token_ids=pb.TokenIds(ids=[1] * (count // 2)))
    other = pb.Prefix(token_ids=pb.TokenIds(ids=[1] * (count - count // 2)))
    fork = pb.ParallelStage(
        branches=[pb.BranchSpec(prefix=half), pb.BranchSpec(prefix=other)], join=pb.JOIN_NONE
    )
    return of_plan(pb.Stage(parallel=fork))


BOUNDS = {
    "turns": (turns, MAX_TURNS, "prompt.chat.messages", {"max_context": 10**6}),
    "label": (
        lambda size: of_plan(pb.Stage(parallel=pb.ParallelStage(branches=[pb.BranchSpec(label="x" * size)]))),
        MAX_LABEL_BYTES,
        "plan.stages[0].parallel.branches[0].label",
        {},
    ),
    "salt": (lambda size: of(cache_salt="x" * size), MAX_SALT_BYTES, "cache_salt", {}),
    "sequences": (stages, MAX_SEQUENCES, "plan.stages[0].parallel.branches[7].stages", {}),
    "prefixes": (prefixes, 200, "plan.stages[0].parallel.branches[1].prefix", {}),
    "prompt": (
        lambda count: of(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1] * count))),
        199,
        "prompt",
        {},
    ),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_what_is_as_large_as_its_bound_is_taken_and_one_more_is_not(bound: str):
    make, most, field, model = BOUNDS[bound]
    read_request(make(most), served_model(**model))
    if bound == "sequences":
        most += 63  # the last list begins inside of the bound
    assert field in violations(make(most + 1), **model)


def test_of_many_violations_some_are_told_and_all_are_counted():
    message = of(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[999] * 150)))
    with pytest.raises(InvalidRequestError) as caught:
        read_request(message, served_model())
    assert len(caught.value.violations) == MAX_VIOLATIONS + 1
    assert caught.value.violations[-1] == Violation("", "and 130 more")
    message = of(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[999] * MAX_VIOLATIONS)))
    assert len(violations(message)) == MAX_VIOLATIONS


def test_unknown_fields_are_told_apart_as_long_as_they_are_few():
    few = pb.GenerateRequest.FromString(b"\xf8\x01\x01" * 1000 + of().SerializeToString())
    assert violations(few)["31"] == "this server does not know the field with this number"
    many = pb.GenerateRequest.FromString(b"\xf8\x01\x01" * 2000 + of().SerializeToString())
    assert violations(many) == {"": "this server does not know fields that make up 6000 bytes of the message"}


class Counting(ByteTokenizer):
    """Notes how much it was given."""

    def __init__(self) -> None:
        self.characters = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        self.characters += len(text)
        return super().encode(text, add_special_tokens)


def test_no_long_text_is_tokenized_where_something_else_is_wrong():
    tokenizer = Counting()
    model = {"tokenizer": tokenizer, "max_context": 10**6}
    for length, tokenized in ((20_000, 0), (100, 100)):
        tokenizer.characters = 0
        message = of(prompt=pb.Prompt(text="a" * length), priority=101)
        assert list(violations(message, **model)) == ["priority"]
        assert tokenizer.characters == tokenized


def test_of_a_text_that_is_far_too_long_the_beginning_alone_is_tokenized():
    tokenizer = Counting()
    found = violations(of(prompt=pb.Prompt(text="a" * 100_000)), tokenizer=tokenizer)
    assert list(found) == ["prompt"]
    assert tokenizer.characters == 16 * 200
    tokenizer.characters = 0
    read_request(of(prompt=pb.Prompt(text="a" * 5000)), served_model(tokenizer=tokenizer, max_context=5002))
    assert tokenizer.characters == 5000


class OneToken(ByteTokenizer):
    """Texts are short, however long they are."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [1]


def test_a_long_text_of_few_tokens_is_taken():
    assert read(of(prompt=pb.Prompt(text="a" * 100_000)), tokenizer=OneToken()).prompt == (1,)
