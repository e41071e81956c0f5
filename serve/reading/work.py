"""What reading is: a method's bytes in, what the server goes on with out. It runs wherever it is called."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from google.protobuf.message import DecodeError

from scheduler.request import Request
from serve.reading.faults import Faults, check_model, refuse_text
from serve.reading.requests import read_prompt, read_request
from serve.served import ServedModel
from serve.text.reader import Speller
from taper_client.errors import InvalidRequestError, Violation
from taper_client.v1 import inference_service_pb2 as pb

Method = Literal["Generate", "GatewayGenerate", "Tokenize", "Detokenize"]


class Job(NamedTuple):
    """A message to read, and the id of its call: the one that it brings, or one that was made."""

    method: Method
    data: bytes
    id: str = ""

    @property
    def brings_request(self) -> bool:
        return self.method in ("Generate", "GatewayGenerate")


class Prompted(NamedTuple):
    """A GenerateRequest that has been read, and what says how to tell its answer, as bytes: they cross a
    process's wall. They are its OutputOptions; of a gateway's request, what `gateway.manner` has."""

    request: Request
    output: bytes


Answer = Prompted | bytes
"""What `Generate` goes on with; of the other methods, their response as it is sent."""


class Readers(Protocol):
    """Whoever reads messages for the server, in its event loop."""

    def read(self, job: Job, client: str) -> asyncio.Future[Answer]:
        """Read a client's message. Cancelling the future gives the job up.

        The future raises ServiceError: of what is wrong with the message, or because it cannot be read in
        bounds.
        """
        ...


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads messages for one model."""

    model: ServedModel
    spellers: tuple[Speller, Speller]  # that keep special tokens, and that skip them

    @classmethod
    def of(cls, model: ServedModel) -> Reader:
        spelling = model.tokenizer.spelling
        keep, skip = (Speller(spelling, skip_special_tokens=skip) for skip in (False, True))
        return cls(model, (keep, skip))

    def read(self, job: Job) -> Answer:
        """Raises ServiceError."""
        if job.method == "Generate":
            message = parse(pb.GenerateRequest, job.data)
            return Prompted(read_request(message, self.model, job.id), message.output.SerializeToString())
        if job.method == "GatewayGenerate":
            return self._gateway(job)
        if job.method == "Tokenize":
            return self._tokenize(parse(pb.TokenizeRequest, job.data))
        return self._detokenize(parse(pb.DetokenizeRequest, job.data))

    def _gateway(self, job: Job) -> Prompted:
        from smg_grpc_proto.generated import vllm_engine_pb2 as vllm  # which others need not have

        from serve.reading.gateway import manner, translated

        message = parse(vllm.GenerateRequest, job.data)
        request = read_request(translated(message, self.model), self.model)
        return Prompted(request, manner(message).SerializeToString())

    def _tokenize(self, message: pb.TokenizeRequest) -> bytes:
        faults = Faults(message, self.model)
        faults.extend(check_model(message.model, self.model))
        faults.raise_any()
        ids = read_prompt(message.prompt, self.model)
        return pb.TokenizeResponse(token_ids=ids).SerializeToString()

    def _detokenize(self, message: pb.DetokenizeRequest) -> bytes:
        refuse_text(message, self.model)
        faults = Faults(message, self.model)
        faults.extend(check_model(message.model, self.model))
        most = self.model.max_context
        if len(message.token_ids) > most:
            faults.add("token_ids", f"at most {most} are possible, got {len(message.token_ids)}")
        ids = faults.ids(message.token_ids, "token_ids") if len(message.token_ids) <= most else []
        faults.raise_any()
        text = self.spellers[not message.keep_special_tokens].text(ids)
        return pb.DetokenizeResponse(text=text).SerializeToString()


class ReadHere:
    """Reads in threads of the server's own process: nothing can stop it there."""

    def __init__(self, model: ServedModel) -> None:
        self._reader = Reader.of(model)

    def read(self, job: Job, client: str) -> asyncio.Future[Answer]:
        return asyncio.ensure_future(asyncio.to_thread(self._reader.read, job))


def parse(kind: Any, data: bytes) -> Any:
    """A message of a protobuf class. Raises InvalidRequestError for bytes that are none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise malformed(f"these bytes are no {kind.DESCRIPTOR.full_name}") from None


def malformed(description: str) -> InvalidRequestError:
    """Not wire format, text that is not UTF-8, or nested deeper than protobuf takes."""
    return InvalidRequestError.of([Violation("", description)], reason="MALFORMED")
