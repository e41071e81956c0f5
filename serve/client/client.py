"""A Python client in which branches come first.

    with Client("127.0.0.1:50051") as client:
        answer = client.complete("Tea or coffee?", plan=[parallel(["Tea:", "Coffee:"]), serial("So:")])

`serial`, `parallel` and `branch` describe what is to be decoded; `generate` streams what happens as the
events of `answer`, `complete` collects them. Failures are the exceptions of `api.errors`.
`AsyncClient` is the same with `await`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import grpc

from ..api.errors import CancelledError, from_rpc
from ..api.protos.taper.v1 import control_service_pb2 as control_pb
from ..api.protos.taper.v1 import control_service_pb2_grpc as control_grpc
from ..api.protos.taper.v1 import inference_service_pb2 as pb
from ..api.protos.taper.v1 import inference_service_pb2_grpc as inference_grpc
from .answer import Completion, Event, events_of

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat turns like {"role": "user", "content": "Hello"}."""

Join = Literal["kv", "reprefill", "none"]

_JOINS = {None: pb.JOIN_UNSPECIFIED, "kv": pb.JOIN_KV, "reprefill": pb.JOIN_REPREFILL, "none": pb.JOIN_NONE}


# --- what to decode ----------------------------------------------------------------------------------------


def sampling(
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
) -> pb.SamplingParams:
    """How tokens are drawn. What is not set is inherited: a stage's from its request, greedy at the end."""
    return pb.SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        logit_bias=logit_bias,
    )


def stopping(
    max_tokens: int | None = None,
    *,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
) -> pb.StoppingCriteria:
    """When a sequence ends: at a limit, a string, a token, or where the model ends it."""
    return pb.StoppingCriteria(
        max_tokens=max_tokens, stop=stop, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos
    )


def serial(
    prefix: str | Sequence[int] = "",
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    stopping: pb.StoppingCriteria | None = None,
    sampling: pb.SamplingParams | None = None,
) -> pb.Stage:
    """One sequence, which goes on from `prefix`."""
    ends = stopping or pb.StoppingCriteria(max_tokens=max_tokens, stop=stop)
    return pb.Stage(serial=pb.SerialStage(prefix=_prefix(prefix), stopping=ends, sampling=sampling))


def branch(
    prefix: str | Sequence[int] = "",
    *,
    label: str = "",
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    stopping: pb.StoppingCriteria | None = None,
    sampling: pb.SamplingParams | None = None,
    then: Sequence[pb.Stage] = (),
) -> pb.BranchSpec:
    """One of the sequences of a parallel stage; `then` are stages of its own, which may fork again."""
    ends = stopping or pb.StoppingCriteria(max_tokens=max_tokens, stop=stop)
    return pb.BranchSpec(label=label, prefix=_prefix(prefix), stopping=ends, sampling=sampling, stages=then)


def parallel(
    branches: Sequence[pb.BranchSpec | str],
    *,
    join: Join | None = None,
    first_k: int | None = None,
    max_tokens: int | None = None,
) -> pb.Stage:
    """Sequences at once that share all text before them; a string is a branch that goes on from it.

    join        how the next stage sees them; the model's own way when None
    first_k     join only so many: those with the fewest tokens, of two with as many the earlier one. The
                others are stopped as soon as they cannot be among them; their `finish_reason` is "outrun"
    max_tokens  limit of the branches that have none of their own
    """
    specs = [branch(spec) if isinstance(spec, str) else spec for spec in branches]
    stage = pb.ParallelStage(branches=specs, join=_JOINS[join], first_k=first_k)
    for spec in stage.branches:
        if max_tokens is not None and not spec.stopping.HasField("max_tokens"):
            spec.stopping.max_tokens = max_tokens
    return pb.Stage(parallel=stage)


def model_driven(
    tag_set: str | None = None,
    *,
    fork_tags: pb.ForkTags | None = None,
    max_tokens: int | None = None,
    branch_max_tokens: int | None = None,
    max_branches: int | None = None,
    max_depth: int | None = None,
) -> pb.ModelDriven:
    """Let tags in the model's own text fork; its own tags unless a set, or the tags themselves, are given."""
    return pb.ModelDriven(
        tag_set=tag_set,
        fork_tags=fork_tags,
        stopping=pb.StoppingCriteria(max_tokens=max_tokens),
        branch_max_tokens=branch_max_tokens,
        max_branches=max_branches,
        max_depth=max_depth,
    )


def _prefix(prefix: str | Sequence[int]) -> pb.Prefix | None:
    if isinstance(prefix, str):
        return pb.Prefix(text=prefix) if prefix else None
    return pb.Prefix(token_ids=pb.TokenIds(ids=prefix))


def _prompt(prompt: Prompt) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt)
    items: Sequence[Any] = prompt
    if items and isinstance(items[0], Mapping):
        return pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(**turn) for turn in items]))
    return pb.Prompt(token_ids=pb.TokenIds(ids=items))


class Options(TypedDict, total=False):
    """What `generate` and `complete` take beside the prompt.

    plan          stages, or `model_driven(...)`; without, one sequence up to `max_tokens` and `stop`
    sampling      of every stage that has none of its own; greedy unless given
    tpot_slo_ms   target of the time between tokens; ttft_slo_ms, of the time to the first
    token_ids     also stream ids; logprobs, their log-probabilities; top_logprobs, so many alternatives
    interval_ms   least time between two messages of the stream; one a step unless given
    cache_salt    requests share cached prompts only with requests of the same salt
    priority      under the policy taper:priority, branches of a higher one join a step first; 0 unless given
    """

    plan: Sequence[pb.Stage] | pb.ModelDriven | None
    max_tokens: int | None
    stop: Sequence[str]
    sampling: pb.SamplingParams | None
    tpot_slo_ms: float | None
    ttft_slo_ms: float | None
    token_ids: bool
    logprobs: bool
    top_logprobs: int
    include_stop: bool
    keep_special_tokens: bool
    interval_ms: float
    request_id: str
    cache_salt: str
    priority: int


_OUTPUT = ("token_ids", "logprobs", "top_logprobs", "include_stop", "keep_special_tokens", "interval_ms")

# `complete` shows only the end, and that never waits: few messages are enough, and cost the server less. Not
# none: a reader that does not read any more should be noticed before the end.
_COMPLETE_INTERVAL_MS = 200.0


def generate_request(prompt: Prompt, **options: Unpack[Options]) -> pb.GenerateRequest:
    """The message that `generate` and `complete` send. Raises TypeError for an option that does not exist."""
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    asked: dict[str, Any] = {**options}
    request = pb.GenerateRequest(
        request_id=options.get("request_id", ""),
        prompt=_prompt(prompt),
        sampling=options.get("sampling"),
        slo=pb.Slo(tpot_ms=options.get("tpot_slo_ms"), ttft_ms=options.get("ttft_slo_ms")),
        output=pb.OutputOptions(**{name: value for name, value in asked.items() if name in _OUTPUT}),
        cache_salt=options.get("cache_salt", ""),
        priority=options.get("priority", 0),
    )
    plan = options.get("plan")
    if isinstance(plan, pb.ModelDriven):
        request.model_driven.CopyFrom(plan)
    elif plan is not None:
        request.plan.CopyFrom(pb.Plan(stages=plan))
    else:
        request.stopping.CopyFrom(
            pb.StoppingCriteria(max_tokens=options.get("max_tokens"), stop=options.get("stop", ()))
        )
    return request


# --- clients -----------------------------------------------------------------------------------------------


class Stream:
    """The events of a running request. Leaving the `with` block, or `cancel`, ends it on the server too."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Event]:
        try:
            for response in self._call:
                yield from events_of(response)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        finally:
            self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the request; harmless when it has ended."""
        self._call.cancel()


class AsyncStream:
    """`Stream` for asyncio."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async for response in self._call:
                for event in events_of(response):
                    yield event
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._call.cancelled() and not (task and task.cancelling()):
                raise CancelledError("cancelled by the caller") from None
            raise
        finally:
            self.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the request; harmless when it has ended."""
        self._call.cancel()


class Client:
    """Blocking client of one server. Thread-safe; `Options` are what a request can ask for."""

    def __init__(self, address: str = "127.0.0.1:50051") -> None:
        self._channel = grpc.insecure_channel(address)
        self._inference = inference_grpc.InferenceServiceStub(self._channel)
        self._control = control_grpc.ControlServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Stream:
        """Start a request and stream its events; `timeout` in seconds is its deadline."""
        request = generate_request(prompt, **options)
        return Stream(self._inference.Generate(request, timeout=timeout))

    def complete(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Completion:
        """Run a request to its end."""
        options.setdefault("interval_ms", _COMPLETE_INTERVAL_MS)
        completion = Completion()
        for event in self.generate(prompt, timeout=timeout, **options):
            completion.add(event)
        return completion

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The ids that the server reads for a prompt."""
        request = pb.TokenizeRequest(prompt=_prompt(prompt))
        return list(self._ask(self._inference.Tokenize, request).token_ids)

    def detokenize(self, ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        request = pb.DetokenizeRequest(token_ids=ids, keep_special_tokens=keep_special_tokens)
        return self._ask(self._inference.Detokenize, request).text

    def abort(self, *request_ids: str) -> tuple[str, ...]:
        """End requests from outside of their calls; returns the ids that were running."""
        request = control_pb.AbortRequest(request_ids=request_ids)
        return tuple(self._ask(self._control.Abort, request).aborted_request_ids)

    def set_policy(self, policy: str) -> str:
        """Switch the admission policy (off, cap:N, eager, taper, taper:OPTION); returns the one until now."""
        request = control_pb.SetPolicyRequest(policy=policy)
        return self._ask(self._control.SetPolicy, request).previous_policy

    def model_info(self) -> control_pb.GetModelInfoResponse:
        return self._ask(self._control.GetModelInfo, control_pb.GetModelInfoRequest())

    def server_info(self) -> control_pb.GetServerInfoResponse:
        return self._ask(self._control.GetServerInfo, control_pb.GetServerInfoRequest())

    def load(self) -> control_pb.GetLoadResponse:
        return self._ask(self._control.GetLoad, control_pb.GetLoadRequest())

    @staticmethod
    def _ask(method: Any, request: Any) -> Any:
        try:
            return method(request)
        except grpc.RpcError as error:
            raise from_rpc(error) from None


class AsyncClient:
    """`Client` for asyncio."""

    def __init__(self, address: str = "127.0.0.1:50051") -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._inference = inference_grpc.InferenceServiceStub(self._channel)
        self._control = control_grpc.ControlServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """Start a request and stream its events; `timeout` in seconds is its deadline."""
        request = generate_request(prompt, **options)
        return AsyncStream(self._inference.Generate(request, timeout=timeout))

    async def complete(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Completion:
        """Run a request to its end."""
        options.setdefault("interval_ms", _COMPLETE_INTERVAL_MS)
        completion = Completion()
        async for event in self.generate(prompt, timeout=timeout, **options):
            completion.add(event)
        return completion

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """The ids that the server reads for a prompt."""
        request = pb.TokenizeRequest(prompt=_prompt(prompt))
        return list((await self._ask(self._inference.Tokenize, request)).token_ids)

    async def detokenize(self, ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        request = pb.DetokenizeRequest(token_ids=ids, keep_special_tokens=keep_special_tokens)
        return (await self._ask(self._inference.Detokenize, request)).text

    async def abort(self, *request_ids: str) -> tuple[str, ...]:
        """End requests from outside of their calls; returns the ids that were running."""
        request = control_pb.AbortRequest(request_ids=request_ids)
        return tuple((await self._ask(self._control.Abort, request)).aborted_request_ids)

    async def set_policy(self, policy: str) -> str:
        """Switch the admission policy (off, cap:N, eager, taper, taper:OPTION); returns the one until now."""
        request = control_pb.SetPolicyRequest(policy=policy)
        return (await self._ask(self._control.SetPolicy, request)).previous_policy

    async def model_info(self) -> control_pb.GetModelInfoResponse:
        return await self._ask(self._control.GetModelInfo, control_pb.GetModelInfoRequest())

    async def server_info(self) -> control_pb.GetServerInfoResponse:
        return await self._ask(self._control.GetServerInfo, control_pb.GetServerInfoRequest())

    async def load(self) -> control_pb.GetLoadResponse:
        return await self._ask(self._control.GetLoad, control_pb.GetLoadRequest())

    @staticmethod
    async def _ask(method: Any, request: Any) -> Any:
        try:
            return await method(request)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
