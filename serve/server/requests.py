"""GenerateRequest in, scheduler.request.Request out: the one place where a client's numbers are checked.

Everything wrong with a message is reported at once, by field path. Nothing is silently clamped or dropped: a
field that this server does not know is refused by its number, an id outside of the vocabulary by its place.
"""

from __future__ import annotations

import math
import re
import secrets
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from scheduler.grammars import MULTIVERSE, TagGrammar
from scheduler.program import (
    BranchSpec,
    ParallelStage,
    Plan,
    SerialStage,
    Stage,
    TagProgram,
    fault_of_beginning,
    fault_of_following,
)
from scheduler.request import Request, Slo
from scheduler.sampling import OPTIONS, Option, SamplingParams
from scheduler.stopping import Stopping
from serve.api.errors import InvalidRequestError, Violation
from serve.api.protos.taper.v1 import inference_service_pb2 as pb
from serve.served import ServedModel

ROLES = ("system", "user", "assistant", "tool")
JOINS = {pb.JOIN_KV: "kv", pb.JOIN_REPREFILL: "reprefill", pb.JOIN_NONE: "none"}
MAX_STAGES = 64  # in one list of stages
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_TAG_BYTES = 256
MAX_INTERVAL_MS = 60_000
MAX_PRIORITY = 100

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SLACK = 1e-6  # a float32 0.01 is a little less than 0.01


def read_request(message: pb.GenerateRequest, model: ServedModel) -> Request:
    """What the scheduler is to serve. Raises InvalidRequestError with every violation.

    Tokenizes: milliseconds for a long prompt, so it belongs in a thread. Without a seed, one is drawn.
    """
    return _Reader(message, model).request()


def read_prompt(prompt: pb.Prompt, model: ServedModel) -> list[int]:
    """The ids of a prompt of any kind. Raises InvalidRequestError."""
    reader = _Reader(prompt, model)
    ids = reader.prompt(prompt, "prompt")
    reader.raise_violations()
    return ids


def check_model(name: str, model: ServedModel) -> Iterator[Violation]:
    """A violation unless `name` is the served model's, or empty."""
    if name not in ("", model.name):
        yield Violation("model", f"this server serves {model.name!r}, not {name!r}")


def check_ids(ids: Iterable[int], model: ServedModel, path: str) -> Iterator[Violation]:
    """A violation for each id outside of the vocabulary: a gather would silently read another row."""
    for index, token in enumerate(ids):
        if token >= model.vocab_size:
            yield Violation(
                f"{path}[{index}]", f"{token} is not less than {model.vocab_size}, the vocabulary"
            )


def unknown_fields(message: Message, path: str = "") -> Iterator[Violation]:
    """A violation for each field that this server's schema does not have."""
    for unknown in UnknownFieldSet(message):
        name = f"{path}.{unknown.field_number}" if path else str(unknown.field_number)
        yield Violation(name, "this server does not know the field with this number")
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        name = f"{path}.{descriptor.name}" if path else descriptor.name
        if isinstance(value, Message):
            yield from unknown_fields(value, name)
        else:
            for index, item in enumerate(value):
                yield from unknown_fields(item, f"{name}[{index}]")


class _Reader:
    """Reads one message, collecting violations. Its methods return something usable in any case."""

    def __init__(self, message: Message, model: ServedModel) -> None:
        self._message = message
        self._model = model
        self._violations = list(unknown_fields(message))
        self._too_long: dict[str, str] = {}  # limit and got, once the context has been exceeded
        self._output = pb.OutputOptions()
        self._sampling = SamplingParams()
        self._branches = 0

    def request(self) -> Request:
        message, model = self._message, self._model
        assert isinstance(message, pb.GenerateRequest)
        self._violations += check_model(message.model, model)
        self._output = message.output
        self._check_output()
        prompt = self.prompt(message.prompt, "prompt")
        base = SamplingParams(
            seed=secrets.randbits(64),
            logprobs=message.output.logprobs,
            top_logprobs=message.output.top_logprobs,
        )
        self._sampling = self._read_sampling(message.sampling, base, "sampling")
        request = Request(
            id=self._request_id(message.request_id),
            prompt=tuple(prompt),
            program=self._program(message, len(prompt)),
            sampling=self._sampling,
            slo=self._slo(message.slo),
            cache_salt=message.cache_salt,
            priority=self._priority(message.priority),
        )
        self.raise_violations()
        return request

    def raise_violations(self) -> None:
        if self._violations:
            reason = "PROMPT_TOO_LONG" if self._too_long else ""
            raise InvalidRequestError.of(self._violations, reason=reason, metadata=self._too_long)

    # --- parts of a request ----------------------------------------------------------------------------

    def prompt(self, prompt: pb.Prompt, path: str) -> list[int]:
        kind, ids, before = prompt.WhichOneof("kind"), [], len(self._violations)
        if kind == "text":
            ids = self._model.tokenizer.encode(prompt.text, add_special_tokens=True)
        elif kind == "token_ids":
            ids = self._ids(prompt.token_ids.ids, f"{path}.token_ids.ids")
        elif kind == "chat":
            ids = self._chat(prompt.chat, f"{path}.chat")
        if kind is None:
            self._wrong(path, "one of text, token_ids and chat is needed")
        elif not ids and len(self._violations) == before:
            self._wrong(path, "at least one token is needed")
        self._check_room(len(ids), path)
        return ids

    def _chat(self, chat: pb.Chat, path: str) -> list[int]:
        if not self._model.tokenizer.supports_chat:
            self._wrong(path, f"{self._model.name!r} has no chat template: send text or token_ids")
            return []
        if not chat.messages:
            self._wrong(f"{path}.messages", "at least one message is needed")
            return []
        for index, turn in enumerate(chat.messages):
            if turn.role not in ROLES:
                self._wrong(
                    f"{path}.messages[{index}].role", f"{turn.role!r} is not one of {', '.join(ROLES)}"
                )
        turns = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
        try:
            text = self._model.tokenizer.render_chat(turns)
        except ValueError as error:
            self._wrong(f"{path}.messages", str(error))
            return []
        return self._model.tokenizer.encode(text)

    def _request_id(self, given: str) -> str:
        if given and not _REQUEST_ID.fullmatch(given):
            self._wrong("request_id", f"1 to 128 of A-Z a-z 0-9 . _ - are possible, not {given[:160]!r}")
        return given or uuid.uuid4().hex

    def _slo(self, slo: pb.Slo) -> Slo:
        default = self._model.default_slo
        tpot = self._number(slo, "tpot_ms", "slo", 1e3 * default.tpot, 1e-3, 1e9)
        ttft = self._number(slo, "ttft_ms", "slo", 1e3 * default.ttft, 1e-3, 1e9)
        return Slo(tpot=tpot / 1e3, ttft=ttft / 1e3)

    def _priority(self, given: int) -> int:
        if not -MAX_PRIORITY <= given <= MAX_PRIORITY:
            self._wrong("priority", f"{-MAX_PRIORITY} to {MAX_PRIORITY} are possible, got {given}")
        return given

    def _check_output(self) -> None:
        output, most = self._output, self._model.max_top_logprobs
        if output.top_logprobs > most:
            self._wrong("output.top_logprobs", f"at most {most} are possible, got {output.top_logprobs}")
        if output.top_logprobs and not output.logprobs:
            self._wrong("output.top_logprobs", "needs output.logprobs")
        interval = output.interval_ms
        if not 0 <= interval <= MAX_INTERVAL_MS:
            self._wrong("output.interval_ms", f"0 to {MAX_INTERVAL_MS} are possible, got {interval:g}")

    # --- programs --------------------------------------------------------------------------------------

    def _program(self, message: pb.GenerateRequest, position: int) -> Plan | TagProgram:
        kind = message.WhichOneof("program")
        if kind == "plan":
            if not message.plan.stages:
                self._wrong("plan.stages", "at least one stage is needed")
            stages, _ = self._stages(message.plan.stages, "plan.stages", position, 0, self._sampling)
            return Plan(stages=stages)
        if kind == "model_driven":
            return self._model_driven(message.model_driven, "model_driven")
        return Plan(stages=(SerialStage(stopping=self._stopping(message.stopping, "stopping")),))

    def _stages(
        self, stages: Sequence[pb.Stage], path: str, position: int, depth: int, base: SamplingParams
    ) -> tuple[tuple[Stage, ...], int]:
        """The stages, and the least position after them: what they force into the context counts."""
        read: list[Stage] = []
        if len(stages) > MAX_STAGES:
            self._wrong(path, f"at most {MAX_STAGES} stages are possible, got {len(stages)}")
            return (), position
        for index, stage in enumerate(stages):
            name = f"{path}[{index}]"
            before = read[-1] if read else None
            if fault := fault_of_following(before):
                self._wrong(name, fault)
            if stage.WhichOneof("kind") == "serial":
                serial = self._serial(stage.serial, f"{name}.serial", position, base)
                position += len(serial.prefix)
                read.append(serial)
            elif stage.WhichOneof("kind") == "parallel":
                name = f"{name}.parallel"
                parallel, position = self._parallel(stage.parallel, name, position, depth + 1, base)
                read.append(parallel)
            else:
                self._wrong(name, "one of serial and parallel is needed")
                continue
            if fault := fault_of_beginning(read[-1], before):
                self._wrong(name, fault)
        return tuple(read), position

    def _serial(self, stage: pb.SerialStage, path: str, position: int, base: SamplingParams) -> SerialStage:
        sampling = self._read_sampling(stage.sampling, base, f"{path}.sampling")
        return SerialStage(
            prefix=self._prefix(stage.prefix, f"{path}.prefix", position),
            stopping=self._stopping(stage.stopping, f"{path}.stopping"),
            sampling=self._unless_default(sampling),
        )

    def _parallel(
        self, stage: pb.ParallelStage, path: str, position: int, depth: int, base: SamplingParams
    ) -> tuple[ParallelStage, int]:
        if depth > self._model.max_depth:
            self._wrong(path, f"forks can be nested {self._model.max_depth} deep at most")
            return ParallelStage(branches=()), position
        self._branches += len(stage.branches)
        if self._branches > self._model.max_branches:
            self._wrong(f"{path}.branches", f"a request can have {self._model.max_branches} branches at most")
            return ParallelStage(branches=()), position
        if not stage.branches:
            self._wrong(f"{path}.branches", "at least one branch is needed")
        join = self._join(stage.join, f"{path}.join")
        branches: list[BranchSpec] = []
        ends: list[int] = []
        labels: set[str] = set()
        for index, spec in enumerate(stage.branches):
            name = f"{path}.branches[{index}]"
            if spec.label and spec.label in labels:
                self._wrong(f"{name}.label", f"another branch of the stage is labelled {spec.label!r}")
            labels.add(spec.label)
            branch, end = self._branch(spec, name, position, depth, base)
            branches.append(branch)
            ends.append(end - position)
        after = {"kv": max(ends, default=0), "reprefill": sum(ends), "none": 0}[join]
        self._check_room(position + after, path)
        return ParallelStage(branches=tuple(branches), join=join), position + after

    def _branch(
        self, spec: pb.BranchSpec, path: str, position: int, depth: int, base: SamplingParams
    ) -> tuple[BranchSpec, int]:
        prefix = self._prefix(spec.prefix, f"{path}.prefix", position)
        sampling = self._read_sampling(spec.sampling, base, f"{path}.sampling")
        stages, end = self._stages(spec.stages, f"{path}.stages", position + len(prefix), depth, sampling)
        branch = BranchSpec(
            label=spec.label,
            prefix=prefix,
            stopping=self._stopping(spec.stopping, f"{path}.stopping"),
            sampling=self._unless_default(sampling),
            stages=stages,
        )
        return branch, end

    def _model_driven(self, driven: pb.ModelDriven, path: str) -> TagProgram:
        stopping = self._stopping(driven.stopping, f"{path}.stopping")
        branch_tokens = driven.branch_max_tokens if driven.HasField("branch_max_tokens") else None
        if branch_tokens == 0:
            self._wrong(f"{path}.branch_max_tokens", "must be at least 1")
        return TagProgram(
            grammar=self._grammar(driven, path),
            stopping=stopping,
            branch_max_tokens=min(branch_tokens or stopping.max_tokens, self._model.max_context),
            max_branches=self._limit(driven, "max_branches", path, self._model.max_branches),
            max_depth=self._limit(driven, "max_depth", path, self._model.max_depth),
        )

    def _limit(self, driven: pb.ModelDriven, name: str, path: str, most: int) -> int:
        value = getattr(driven, name) if driven.HasField(name) else most
        if not 1 <= value <= most:
            self._wrong(f"{path}.{name}", f"1 to {most} are possible, got {value}")
        return value

    def _grammar(self, driven: pb.ModelDriven, path: str) -> TagGrammar:
        model = self._model
        if driven.WhichOneof("tags") == "fork_tags":
            return self._fork_tags(driven.fork_tags, f"{path}.fork_tags")
        name = driven.tag_set or model.own_grammar
        if name is None:
            self._wrong(
                f"{path}.tag_set", f"{model.name!r} has no tags of its own: name a tag set, or send tags"
            )
        elif name not in model.grammars:
            self._wrong(f"{path}.tag_set", f"{name!r} is not one of {', '.join(model.grammars)}")
        return model.grammars.get(name or "", MULTIVERSE)  # any will do beside a violation

    def _fork_tags(self, tags: pb.ForkTags, path: str) -> TagGrammar:
        for name in ("plan_open", "label_open", "label_close", "plan_close", "branch_open", "branch_close"):
            if not getattr(tags, name):
                self._wrong(f"{path}.{name}", "is needed")
        for descriptor, value in tags.ListFields():
            if isinstance(value, str) and len(value.encode()) > MAX_TAG_BYTES:
                self._wrong(f"{path}.{descriptor.name}", f"at most {MAX_TAG_BYTES} bytes are possible")
        join = self._join(tags.join, f"{path}.join")
        if join == "none":
            self._wrong(f"{path}.join", "the branches of a model-driven fork are always joined")
        if join == "kv" and not tags.join_open:
            self._wrong(f"{path}.join_open", "is needed after a kv join")
        # Bounded repetitions over literals: a client cannot make the match slow.
        label = r"[ \t]{0,8}([^\n]{1,128}?)[ \t]{0,8}"
        return TagGrammar(
            name="request",
            plan_open=tags.plan_open,
            outline=re.escape(tags.label_open) + label + re.escape(tags.label_close),
            plan_close=tags.plan_close,
            branch_open=tags.branch_open,
            branch_close=tags.branch_close,
            join_open=tags.join_open,
            join=join,
        )

    # --- parts of a stage ------------------------------------------------------------------------------

    def _join(self, join: pb.Join, path: str) -> str:
        if join != pb.JOIN_UNSPECIFIED and join not in JOINS:
            self._wrong(path, f"{join} is not a Join of this server")
        return JOINS.get(join, self._model.join)

    def _prefix(self, prefix: pb.Prefix, path: str, position: int) -> tuple[int, ...]:
        ids: list[int] = []
        if prefix.WhichOneof("kind") == "text":
            ids = self._model.tokenizer.encode(prefix.text)
        elif prefix.WhichOneof("kind") == "token_ids":
            ids = self._ids(prefix.token_ids.ids, f"{path}.token_ids.ids")
        self._check_room(position + len(ids), path)
        return tuple(ids)

    def _stopping(self, stopping: pb.StoppingCriteria, path: str) -> Stopping:
        model = self._model
        most = stopping.max_tokens if stopping.HasField("max_tokens") else model.default_max_tokens
        if most < 1:
            self._wrong(f"{path}.max_tokens", "must be at least 1")
        for name in ("stop", "stop_token_ids"):
            count = len(getattr(stopping, name))
            if count > MAX_STOPS:
                self._wrong(f"{path}.{name}", f"at most {MAX_STOPS} are possible, got {count}")
        for index, text in enumerate(stopping.stop):
            if not 1 <= len(text.encode()) <= MAX_STOP_BYTES:
                self._wrong(f"{path}.stop[{index}]", f"1 to {MAX_STOP_BYTES} bytes are possible")
        return Stopping(
            max_tokens=min(most, model.max_context),  # the context ends it first
            eos_ids=frozenset() if stopping.ignore_eos else frozenset(model.eos_ids),
            stop_ids=frozenset(self._ids(stopping.stop_token_ids, f"{path}.stop_token_ids")),
            stop_strings=tuple(stopping.stop),
            include_stop=self._output.include_stop,
        )

    def _unless_default(self, sampling: SamplingParams) -> SamplingParams | None:
        return None if sampling == self._sampling else sampling

    def _read_sampling(self, given: pb.SamplingParams, base: SamplingParams, path: str) -> SamplingParams:
        """`base` with the fields that were set."""
        model = self._model
        numbers = {option.name: self._option(option, given, base, path) for option in OPTIONS}
        if len(given.logit_bias) > model.max_logit_bias:
            most, count = model.max_logit_bias, len(given.logit_bias)
            self._wrong(f"{path}.logit_bias", f"at most {most} are possible, got {count}")
        for token, bias in given.logit_bias.items():
            name = f"{path}.logit_bias[{token}]"
            if token >= model.vocab_size:
                self._wrong(name, f"the id is not less than {model.vocab_size}, the vocabulary")
            if not -100 <= bias <= 100:
                self._wrong(name, f"-100 to 100 are possible, got {bias:g}")
        return replace(
            base,
            **numbers,
            seed=given.seed if given.HasField("seed") else base.seed,
            logit_bias=tuple(sorted(given.logit_bias.items())) or base.logit_bias,
        )

    def _option(
        self, option: Option, given: pb.SamplingParams, base: SamplingParams, path: str
    ) -> int | float:
        """A number among the options, in its range and outside of the gap that it may have there."""
        name = option.name
        value = self._number(given, name, path, getattr(base, name), option.low, option.high)
        if name == "temperature" and 0 < value < 0.01 - _SLACK:
            self._wrong(f"{path}.{name}", f"0 (greedy) or 0.01 to 100 are possible, got {value:g}")
        if name == "top_p" and value == 0:
            self._wrong(f"{path}.{name}", "must be more than 0")
        if name == "top_k" and value >= self._model.vocab_size:
            return 0  # all of it: off
        return value

    # --- checks ----------------------------------------------------------------------------------------

    def _wrong(self, path: str, description: str) -> None:
        self._violations.append(Violation(path, description))

    def _ids(self, ids: Sequence[int], path: str) -> list[int]:
        self._violations += check_ids(ids, self._model, path)
        return list(ids)

    def _number(
        self, message: Message, name: str, path: str, default: float, low: float, high: float
    ) -> float:
        if not message.HasField(name):
            return default
        value = getattr(message, name)
        if not (math.isfinite(value) and low - _SLACK * abs(low) <= value <= high + _SLACK * abs(high)):
            self._wrong(f"{path}.{name}", f"{low:g} to {high:g} are possible, got {value:g}")
            return default
        return value

    def _check_room(self, tokens: int, path: str) -> None:
        """One position has to be left for the answer."""
        limit = self._model.max_context - 1
        if tokens > limit and not self._too_long:
            self._too_long = {"limit": str(limit), "got": str(tokens)}
            self._wrong(
                path, f"the context would hold {tokens} given tokens, and at most {limit} are possible"
            )
