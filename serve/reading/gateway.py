"""A gateway's request as one of taper.v1, and what of it this server cannot do.

Its messages are from the package smg-grpc-proto: this is imported only where a gateway asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from serve.served import ServedModel
from taper_client.errors import InvalidRequestError, Violation
from taper_client.v1 import inference_service_pb2 as pb

# What OpenAI's API and vLLM have where a request says nothing; taper.v1 would be greedy.
_DEFAULT_TEMPERATURE = 1.0
_SEEDS = 1 << 64

# Fields that would change the answer if they were passed over, and why they are not possible.
_UNKNOWN: dict[str, str] = {
    "mm_inputs": "images and other media are not possible",
    "extra_mm_inputs": "images and other media are not possible",
    "media_refs": "images and other media are not possible",
    "kv_transfer_params": "prefill and decode are not divided between servers",
    "kv_transfer_params_json": "prefill and decode are not divided between servers",
}
_UNKNOWN_SAMPLING: dict[str, str] = {
    "min_tokens": "a least number of tokens is not possible",
    "prompt_logprobs": "log-probabilities of the prompt are not possible",
    "truncate_prompt_tokens": "a prompt is never cut",
}


def translated(message: vllm.GenerateRequest, model: ServedModel) -> pb.GenerateRequest:
    """What to read in its place. Raises InvalidRequestError for what it asks and cannot have.

    Where `n` asks for several answers, they are branches that nothing joins; else the model forks by its own
    tags, if it has some.
    """
    if violations := [*_violations(message, model)]:
        raise InvalidRequestError.of(violations)
    asked = message.sampling_params
    request = pb.GenerateRequest(
        request_id=message.request_id,
        prompt=_prompt(message),
        sampling=_sampling(asked),
        output=pb.OutputOptions(
            logprobs=asked.HasField("logprobs"),
            top_logprobs=asked.logprobs,
            keep_special_tokens=not asked.skip_special_tokens,
        ),
    )
    stopping = pb.StoppingCriteria(
        max_tokens=asked.max_tokens if asked.HasField("max_tokens") else None,
        stop=asked.stop,
        stop_token_ids=asked.stop_token_ids,
        ignore_eos=asked.ignore_eos,
    )
    if asked.n > 1:
        branches = [pb.BranchSpec(stopping=stopping)] * asked.n
        stage = pb.ParallelStage(branches=branches, join=pb.JOIN_NONE)
        request.plan.stages.add(parallel=stage)
    elif model.own_grammar is not None:
        request.model_driven.stopping.CopyFrom(stopping)
    else:
        request.stopping.CopyFrom(stopping)
    return request


def manner(message: vllm.GenerateRequest) -> vllm.GenerateRequest:
    """What of it says how its answer is told."""
    asked = message.sampling_params
    told = vllm.GenerateRequest(stream=message.stream, sampling_params=vllm.SamplingParams(n=asked.n))
    if asked.HasField("logprobs"):
        told.sampling_params.logprobs = asked.logprobs
    return told


def _violations(message: vllm.GenerateRequest, model: ServedModel) -> Iterator[Violation]:
    given = {field.name for field, _ in message.ListFields()}
    yield from (Violation(name, why) for name, why in _UNKNOWN.items() if name in given)
    asked = message.sampling_params
    given = {field.name for field, _ in asked.ListFields()}
    for name, why in _UNKNOWN_SAMPLING.items():
        if name in given:
            yield Violation(f"sampling_params.{name}", why)
    if constraint := asked.WhichOneof("constraint"):
        yield Violation(f"sampling_params.{constraint}", "answers of a given form are not possible")
    if asked.n > model.max_branches:
        yield Violation("sampling_params.n", f"at most {model.max_branches} are possible, got {asked.n}")
    if asked.logprobs < 0:
        yield Violation("sampling_params.logprobs", "those of the whole vocabulary are not possible")


def _prompt(message: vllm.GenerateRequest) -> pb.Prompt:
    match message.WhichOneof("input"):
        case "tokenized":
            return pb.Prompt(token_ids=pb.TokenIds(ids=message.tokenized.input_ids))
        case "text":
            return pb.Prompt(text=message.text)
        case _:
            return pb.Prompt()


def _sampling(asked: vllm.SamplingParams) -> pb.SamplingParams:
    """Where zero cannot be told from unset and is no value, it is unset."""
    values: dict[str, Any] = {
        "temperature": asked.temperature if asked.HasField("temperature") else _DEFAULT_TEMPERATURE,
        "top_p": asked.top_p or None,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty or None,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "seed": asked.seed % _SEEDS if asked.HasField("seed") else None,
    }
    sampling = pb.SamplingParams(**values)
    for token, bias in asked.logit_bias.items():
        sampling.logit_bias[token % (1 << 32)] = bias  # a negative id is none of the vocabulary's
    return sampling
