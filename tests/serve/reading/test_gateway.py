"""What a gateway asks becomes what taper.v1 asks, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from scheduler.program import Plan, TagProgram
from scheduler.request import Request
from serve.reading.gateway import manner, translated
from serve.reading.requests import read_request
from taper_client.errors import InvalidRequestError
from tests.serve.fakes import EOS, VOCAB, served_model

IDS = [5, 6, 7]


def message(text: str | None = None, **sampling: Any) -> vllm.GenerateRequest:
    asked = vllm.GenerateRequest(request_id="r", sampling_params=vllm.SamplingParams(**sampling))
    if text is None:
        asked.tokenized.input_ids.extend(IDS)
    else:
        asked.text = text
    return asked


def read(asked: vllm.GenerateRequest, **model: Any) -> Request:
    served = served_model(**model)
    return read_request(translated(asked, served), served)


def test_a_prompt_is_token_ids_or_text() -> None:
    assert read(message()).prompt == tuple(IDS)
    assert bytes(read(message("hi")).prompt[1:]) == b"hi"


def test_every_sampling_option_arrives() -> None:
    numbers = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 9,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "seed": 12,
    }
    sampling = read(message(**numbers, logit_bias={3: -2.0}, logprobs=4)).sampling
    assert {name: getattr(sampling, name) for name in numbers} == numbers
    assert dict(sampling.logit_bias) == {3: -2.0}
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 4)


def test_what_is_unset_is_as_openai_has_it() -> None:
    sampling = read(message()).sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (1.0, 1.0, 1.0)
    assert not sampling.logprobs
    assert read(message(temperature=0.0)).sampling.temperature == 0.0


def test_a_seed_may_be_negative() -> None:
    assert read(message(seed=-1)).sampling.seed == 2**64 - 1


def test_what_ends_an_answer_arrives() -> None:
    program = read(message(max_tokens=9, stop=["x"], stop_token_ids=[4])).program
    assert isinstance(program, Plan)
    [stage] = program.stages
    [part] = stage.parts
    stopping = part.stopping
    assert (stopping.max_tokens, stopping.stop_strings, stopping.stop_ids) == (9, ("x",), {4})
    assert stopping.eos_ids == {EOS}
    [stage] = read(message(ignore_eos=True)).program.stages
    assert stage.parts[0].stopping.eos_ids == frozenset()


@pytest.mark.parametrize("skips", [True, False])
def test_a_stop_string_is_looked_for_in_the_text_that_the_gateway_makes(skips: bool) -> None:
    [stage] = read(message(stop=["x"], skip_special_tokens=skips)).program.stages
    assert stage.parts[0].stopping.special_tokens is not skips


def test_how_an_answer_is_told_is_kept_apart_from_what_is_asked() -> None:
    asked = message(n=3, logprobs=0, stop=["x"])  # of the drawn tokens alone
    asked.stream = True
    kept = vllm.GenerateRequest(stream=True, sampling_params=vllm.SamplingParams(n=3, logprobs=0))
    assert manner(asked) == kept
    assert not manner(message()).sampling_params.HasField("logprobs")


def test_a_model_that_forks_by_itself_does() -> None:
    program = read(message(max_tokens=9), own_grammar="multiverse").program
    assert isinstance(program, TagProgram)
    assert program.stopping.max_tokens == 9


def test_several_answers_are_branches_that_nothing_joins() -> None:
    program = read(message(n=3, max_tokens=9, temperature=0.0), own_grammar="multiverse").program
    assert isinstance(program, Plan)
    [stage] = program.stages
    assert ([spec.stopping.max_tokens for spec in stage.parts], stage.join) == ([9, 9, 9], "none")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_tokens", 3),
        ("prompt_logprobs", 1),
        ("prompt_logprobs", 0),
        ("truncate_prompt_tokens", 5),
        ("logprobs", -1),
        ("n", 65),
        ("json_schema", "{}"),
        ("regex", "a*"),
        ("grammar", "root ::= x"),
        ("structural_tag", "{}"),
        ("json_object", True),
        ("choice", vllm.ChoiceConstraint(choices=["a"])),
    ],
)
def test_what_it_cannot_have_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(message(**{field: value}))
    assert [violation.field for violation in caught.value.violations] == [f"sampling_params.{field}"]


def test_media_and_divided_servers_are_refused_all_at_once() -> None:
    asked = message(min_tokens=1)
    asked.mm_inputs.im_token_id = 3
    asked.kv_transfer_params_json = "{}"
    with pytest.raises(InvalidRequestError) as caught:
        read(asked)
    assert {violation.field for violation in caught.value.violations} == {
        "mm_inputs",
        "kv_transfer_params_json",
        "sampling_params.min_tokens",
    }


def test_every_field_of_a_request_is_passed_on_refused_or_known_to_change_nothing() -> None:
    """So that a newer gateway's are looked at before they are passed over."""
    passed_on = {"request_id", "tokenized", "text", "sampling_params", "stream"}
    changes_nothing = {"data_parallel_rank"}
    refused = {
        "mm_inputs", "extra_mm_inputs", "media_refs", "kv_transfer_params", "kv_transfer_params_json",
    }  # fmt: skip
    fields = {field.name for field in vllm.GenerateRequest.DESCRIPTOR.fields}
    assert fields == passed_on | changes_nothing | refused
    passed_on = {
        "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
        "repetition_penalty", "max_tokens", "stop", "stop_token_ids", "skip_special_tokens", "ignore_eos",
        "n", "logprobs", "seed", "logit_bias",
    }  # fmt: skip
    # The gateway makes the text; a grammar's place matters to no answer without one.
    changes_nothing = {
        "spaces_between_special_tokens", "include_stop_str_in_output", "grammar_from_first_token",
    }  # fmt: skip
    refused = {
        "min_tokens", "prompt_logprobs", "truncate_prompt_tokens", "json_schema", "regex", "grammar",
        "structural_tag", "json_object", "choice",
    }  # fmt: skip
    fields = {field.name for field in vllm.SamplingParams.DESCRIPTOR.fields}
    assert fields == passed_on | changes_nothing | refused


@pytest.mark.parametrize("asked", [message(logit_bias={-1: 1.0}), message(stop_token_ids=[VOCAB])])
def test_an_id_that_is_none_of_the_vocabulary_is_refused(asked: vllm.GenerateRequest) -> None:
    with pytest.raises(InvalidRequestError):
        read(asked)
