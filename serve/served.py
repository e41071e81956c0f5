"""What is served: an engine, and its model as clients see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from scheduler.grammars import MULTIVERSE, TagGrammar
from scheduler.request import Slo
from serve.config import ServerConfig
from serve.door import Engine, Watcher
from serve.text.reader import Spelling


class Tokenizer(Protocol):
    """What the service asks of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...
    def encode_continuation(self, text: str) -> list[int]: ...
    @property
    def spelling(self) -> Spelling: ...
    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str: ...
    @property
    def supports_chat(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The served model as clients see it, and the limits of a request. Times are in seconds.

    join         the model's own join, `kv` or `reprefill`
    supports_text  whether there is a tokenizer; without one, token ids can be served all the same
    grammars     the tag sets that a model-driven request may name; own_grammar is the model's own, if any
    """

    name: str
    architecture: str
    tokenizer: Tokenizer
    supports_text: bool = True
    vocab_size: int
    max_context: int
    eos_ids: tuple[int, ...]
    join: str = "reprefill"
    grammars: Mapping[str, TagGrammar] = field(default_factory=lambda: {MULTIVERSE.name: MULTIVERSE})
    own_grammar: str | None = None
    max_branches: int = 64
    max_depth: int = 4
    max_logit_bias: int = 64
    max_top_logprobs: int = 8
    default_max_tokens: int = 256
    default_slo: Slo = field(default_factory=Slo)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server serves: a started engine, and its model.

    device          kind of the devices that share the model, of which there are `devices`
    largest_bucket  rows that one step can have
    summary         what getting ready came to, for the operator
    """

    engine: Engine
    model: ServedModel
    device: str = "cpu"
    devices: int = 1
    largest_bucket: int = 64
    summary: str = ""


Loader = Callable[[ServerConfig, Watcher], Served]
"""Loads, compiles and starts everything; may take minutes. The watcher is told of every step."""
