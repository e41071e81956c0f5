"""GenerateRequest in, scheduler.request.Request out: everything wrong with a message is reported at once."""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from scheduler.request import Request, Slo
from scheduler.sampling import SamplingParams
from serve.reading.faults import Faults, check_model, refuse_text
from serve.reading.programs import ProgramReader
from serve.reading.sampling import read_sampling
from serve.served import ServedModel, Tokenizer
from serve.text.reader import Spelling
from taper_client.v1 import inference_service_pb2 as pb

ROLES = ("system", "user", "assistant", "tool")
MAX_INTERVAL_MS = 60_000
MAX_PRIORITY = 100
FLOAT32 = 1e-6  # by which a number may differ that has come as a float
MAX_TURNS = 4096  # of a chat
MAX_SALT_BYTES = 256
MAX_RENDERED = 1 << 23  # characters of a chat, once it is a text
SMALL = 1 << 14  # bytes of a message whose texts are read even if something else is wrong with it

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def is_id(given: str) -> bool:
    """Whether a request can have it as its id."""
    return bool(_REQUEST_ID.fullmatch(given))


def read_request(message: pb.GenerateRequest, model: ServedModel, made: str = "") -> Request:
    """What the scheduler is to serve. Raises InvalidRequestError with every violation.

    `made` is its id if it brings none. Without a seed, one is drawn. Tokenizes, which may take seconds: a
    message of some size has nothing else wrong with it by then.
    """
    refuse_text(message, model)
    if message.ByteSize() > SMALL:
        faults = Faults(message, replace(model, tokenizer=_Unread(model.tokenizer)))
        _Reader(faults).request(message, made)
        faults.raise_any()
    faults = Faults(message, model)
    request = _Reader(faults).request(message, made)
    faults.raise_any()
    return request


def read_prompt(prompt: pb.Prompt, model: ServedModel) -> list[int]:
    """The ids of a prompt of any kind. Raises InvalidRequestError."""
    refuse_text(prompt, model, "prompt")
    faults = Faults(prompt, model)
    ids = _Reader(faults).prompt(prompt, "prompt")
    faults.raise_any()
    return ids


@dataclass(frozen=True, slots=True)
class _Unread:
    """A tokenizer that reads nothing: every text is one token of the vocabulary."""

    tokenizer: Tokenizer

    @property
    def spelling(self) -> Spelling:
        return self.tokenizer.spelling

    @property
    def supports_chat(self) -> bool:
        return self.tokenizer.supports_chat

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [0]

    def encode_continuation(self, text: str) -> list[int]:
        return [0][: len(text)]

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return ""


class _Reader:
    """Reads one message, collecting its faults. Its methods return something usable in any case."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._model = faults.model

    def request(self, message: pb.GenerateRequest, made: str) -> Request:
        self._faults.extend(check_model(message.model, self._model))
        self._check_output(message)
        prompt = self.prompt(message.prompt, "prompt")
        base = SamplingParams(
            seed=secrets.randbits(64),
            logprobs=message.output.logprobs,
            top_logprobs=message.output.top_logprobs,
        )
        sampling = read_sampling(self._faults, message.sampling, base, "sampling")
        kept = message.output.keep_special_tokens
        programs = ProgramReader(self._faults, sampling, keep_special_tokens=kept)
        return Request(
            id=self._request_id(message.request_id) or made or uuid.uuid4().hex,
            prompt=tuple(prompt),
            program=programs.program(message, len(prompt)),
            sampling=sampling,
            slo=self._slo(message.slo),
            cache_salt=self._faults.size(message.cache_salt, "cache_salt", MAX_SALT_BYTES),
            priority=self._priority(message.priority),
        )

    def prompt(self, prompt: pb.Prompt, path: str) -> list[int]:
        kind, ids, before = prompt.WhichOneof("kind"), [], len(self._faults)
        if kind == "text":
            encode = partial(self._model.tokenizer.encode, add_special_tokens=True)
            ids = self._faults.encoded(encode, prompt.text, f"{path}.text")
        elif kind == "token_ids":
            ids = self._faults.ids(prompt.token_ids.ids, f"{path}.token_ids.ids")
        elif kind == "chat":
            ids = self._chat(prompt.chat, f"{path}.chat")
        if kind is None:
            self._faults.add(path, "one of text, token_ids and chat is needed")
        elif not ids and len(self._faults) == before:
            self._faults.add(path, "at least one token is needed")
        self._faults.check_room(len(ids), path)
        return ids

    def _chat(self, chat: pb.Chat, path: str) -> list[int]:
        if not self._model.tokenizer.supports_chat:
            self._faults.add(path, f"{self._model.name!r} has no chat template: send text or token_ids")
            return []
        if not chat.messages:
            self._faults.add(f"{path}.messages", "at least one message is needed")
            return []
        if len(chat.messages) > MAX_TURNS:
            self._faults.add(
                f"{path}.messages", f"at most {MAX_TURNS} turns are possible, got {len(chat.messages)}"
            )
            return []
        for index, turn in enumerate(chat.messages):
            if turn.role not in ROLES:
                self._faults.add(
                    f"{path}.messages[{index}].role", f"{turn.role[:40]!r} is not one of {', '.join(ROLES)}"
                )
        turns = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
        try:
            text = self._model.tokenizer.render_chat(turns)
        except ValueError as error:
            self._faults.add(f"{path}.messages", str(error)[:1000])
            return []
        if len(text) > MAX_RENDERED:
            self._faults.add(f"{path}.messages", f"they are a text of more than {MAX_RENDERED} characters")
            return []
        return self._faults.encoded(self._model.tokenizer.encode, text, f"{path}.messages")

    def _request_id(self, given: str) -> str:
        if given and not is_id(given):
            self._faults.add("request_id", f"1 to 128 of A-Z a-z 0-9 . _ - are possible, not {given[:160]!r}")
        return given

    def _slo(self, slo: pb.Slo) -> Slo:
        default = self._model.default_slo
        tpot = self._faults.number(slo, "tpot_ms", "slo", 1e3 * default.tpot, 1e-3, 1e9)
        ttft = self._faults.number(slo, "ttft_ms", "slo", 1e3 * default.ttft, 1e-3, 1e9)
        if slo.on_miss not in pb.OnMiss.values():
            self._faults.add("slo.on_miss", f"{slo.on_miss} is not an OnMiss of this server")
        best_effort = slo.on_miss == pb.ON_MISS_BEST_EFFORT
        least = 1e3 * self._model.min_tpot
        below = slo.HasField("tpot_ms") and tpot < (1.0 - FLOAT32) * least
        if below and not best_effort:
            self._faults.below_floor("slo.tpot_ms", least, tpot)
        reject = slo.on_miss == pb.ON_MISS_REJECT or (default.reject and not best_effort)
        return Slo(tpot=tpot / 1e3, ttft=ttft / 1e3, binding=not below, reject=reject)

    def _priority(self, given: int) -> int:
        if not -MAX_PRIORITY <= given <= MAX_PRIORITY:
            self._faults.add("priority", f"{-MAX_PRIORITY} to {MAX_PRIORITY} are possible, got {given}")
        return given

    def _check_output(self, message: pb.GenerateRequest) -> None:
        output, most = message.output, self._model.max_top_logprobs
        if output.top_logprobs > most:
            self._faults.add("output.top_logprobs", f"at most {most} are possible, got {output.top_logprobs}")
        if output.top_logprobs and not output.logprobs:
            self._faults.add("output.top_logprobs", "needs output.logprobs")
        interval = output.interval_ms
        if not 0 <= interval <= MAX_INTERVAL_MS:
            self._faults.add("output.interval_ms", f"0 to {MAX_INTERVAL_MS} are possible, got {interval:g}")
