"""The messages that a client sends, as its caller wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from .arguments import items, known, merged, message, one_of, text, token_ids, whole, wrong_type, wrong_value
from .options import ELSEWHERE, Options, sampling_of, stopping_of
from .plan import inherit_stopping, parallel, stages_of
from .v1 import control_service_pb2 as control_pb
from .v1 import inference_service_pb2 as pb

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat turns like {"role": "user", "content": "Hello"}."""

_OWN = ("request_id", "model", "cache_salt", "priority")
_TARGETS = {"tpot_ms": "tpot_slo_ms", "ttft_ms": "ttft_slo_ms"}
_ON_MISS = {"best_effort": pb.ON_MISS_BEST_EFFORT, "reject": pb.ON_MISS_REJECT}


def generate_request(prompt: Prompt, **options: Unpack[Options]) -> pb.GenerateRequest:
    """The message that `Client.generate` and `Client.complete` send, for those who send it themselves.

    Raises TypeError or ValueError for an argument that is wrong.
    """
    known(options, Options.__annotations__, ELSEWHERE)
    given: Mapping[str, Any] = options
    request = message(pb.GenerateRequest, {name: given.get(name) for name in _OWN})
    request.prompt.CopyFrom(_prompt(prompt))
    sampling = sampling_of(options)
    if sampling is not None:
        request.sampling.CopyFrom(sampling)
    targets = {field: given.get(name) for field, name in _TARGETS.items()}
    request.slo.CopyFrom(message(pb.Slo, targets, _TARGETS))
    if (on_miss := given.get("on_miss")) is not None:
        request.slo.on_miss = _ON_MISS[one_of("on_miss", on_miss, _ON_MISS)]
    output = {field.name: given.get(field.name) for field in pb.OutputOptions.DESCRIPTOR.fields}
    request.output.CopyFrom(message(pb.OutputOptions, output))
    _add_program(request, options)
    return request


def tokenize_request(prompt: Prompt) -> pb.TokenizeRequest:
    return pb.TokenizeRequest(prompt=_prompt(prompt))


def detokenize_request(ids: Sequence[int], keep_special_tokens: bool) -> pb.DetokenizeRequest:
    request = message(pb.DetokenizeRequest, {"keep_special_tokens": keep_special_tokens})
    request.token_ids.extend(token_ids("ids", ids))
    return request


def abort_request(request_ids: Sequence[str]) -> control_pb.AbortRequest:
    return message(control_pb.AbortRequest, {"request_ids": request_ids})


def policy_request(policy: str) -> control_pb.SetPolicyRequest:
    return control_pb.SetPolicyRequest(policy=text("policy", policy))


# --- parts of a request ------------------------------------------------------------------------------------


def _add_program(request: pb.GenerateRequest, options: Options) -> None:
    """One sequence, `n` of them, or a plan whose stages inherit what stands beside it."""
    plan, stopping = options.get("plan"), stopping_of(options)
    answers = 1 if options.get("n") is None else whole("n", options.get("n"), 1)
    if answers > 1:
        _check_answers(answers, plan, request.sampling)
        plan = [parallel([""] * answers, join="none")]
    if plan is None:
        request.stopping.CopyFrom(stopping)
    elif isinstance(plan, pb.ModelDriven):
        request.model_driven.CopyFrom(plan)
        request.model_driven.stopping.CopyFrom(merged(stopping, plan.stopping))
    else:
        request.plan.stages.extend(stages_of("plan", plan))
        if not request.plan.stages:
            raise wrong_value("plan", plan, "at least one stage is needed; leave it out for one sequence")
        inherit_stopping(request.plan.stages, stopping)


def _check_answers(answers: int, plan: Any, sampling: pb.SamplingParams) -> None:
    if plan is not None:
        needed = "a plan lays out one answer; parallel([...], join='none') in it has several ends"
        raise wrong_value("n", answers, needed)
    if not sampling.temperature:
        raise wrong_value("n", answers, "greedy answers are all the same; give a temperature, such as 1.0")


def _prompt(prompt: Any) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(text=text("prompt", prompt))
    if isinstance(prompt, bytes | bytearray):
        raise wrong_type("prompt", prompt, "a str is needed; decode it first")
    if isinstance(prompt, Mapping):
        raise wrong_type("prompt", prompt, "a list of turns is needed; write [...] around it")
    given = items("prompt", prompt, "text, a list of token ids or a list of chat turns")
    if not len(given):
        raise wrong_value("prompt", prompt, "at least one token id or chat turn is needed")
    if isinstance(given[0], Mapping):
        turns = [_turn(f"prompt[{index}]", turn) for index, turn in enumerate(given)]
        return pb.Prompt(chat=pb.Chat(messages=turns))
    if isinstance(given[0], str):
        raise wrong_type("prompt[0]", given[0], "a token id or a chat turn is needed; a call has one prompt")
    return pb.Prompt(token_ids=pb.TokenIds(ids=token_ids("prompt", given)))


def _turn(name: str, turn: Any) -> pb.ChatMessage:
    if not isinstance(turn, Mapping):
        raise wrong_type(name, turn, "a turn like {'role': 'user', 'content': 'Hello'} is needed")
    fields = [field.name for field in pb.ChatMessage.DESCRIPTOR.fields]
    if {*turn} != {*fields}:
        raise wrong_value(name, turn, f"exactly {' and '.join(map(repr, fields))} are needed")
    called = {field: f"{name}[{field!r}]" for field in fields}
    return pb.ChatMessage(**{field: text(called[field], turn[field]) for field in fields})
