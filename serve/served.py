"""What is served: an engine, and its model as clients see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from model.config import ModelConfig
from model.tokenizer import Tokenizer as ModelTokenizer
from scheduler.grammars import GRAMMARS, MULTIVERSE, TagGrammar
from scheduler.request import Slo
from serve.config import ServerConfig
from serve.door import Engine, Watcher
from serve.text.reader import Spelling

MIN_TPOT = 1.5  # times the step of one row: a tighter target would leave no room for anybody else


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
    min_tpot     the least TPOT target that a request may ask for
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
    min_tpot: float = 0.0

    @classmethod
    def of(
        cls, config: ServerConfig, model: ModelConfig, tokenizer: ModelTokenizer, unloaded_step: float = 0.0
    ) -> ServedModel:
        """A model as a server with this config serves it, whose steps of one row take `unloaded_step`."""
        slo = Slo(tpot=config.tpot_slo_ms / 1e3, ttft=config.ttft_slo_ms / 1e3, reject=config.reject_late)
        least = max(unloaded_step, min(slo.tpot, MIN_TPOT * unloaded_step))
        told = None if config.tag_set is None else GRAMMARS[config.tag_set]
        return cls(
            name=model.name,
            architecture=model.architecture,
            tokenizer=tokenizer,
            supports_text=tokenizer.supports_text,
            vocab_size=model.vocab_size,
            max_context=min(model.max_context, config.max_context or model.max_context),
            eos_ids=tokenizer.eos_ids or model.eos_ids,
            join=told.join if told else model.join,
            grammars=GRAMMARS,
            own_grammar=told.name if told else model.tag_grammar,
            max_branches=config.max_branches,
            max_depth=config.max_depth,
            max_logit_bias=config.max_logit_bias,
            max_top_logprobs=config.max_top_logprobs,
            default_max_tokens=config.default_max_tokens,
            default_slo=slo,
            min_tpot=least if config.min_tpot_slo_ms is None else config.min_tpot_slo_ms / 1e3,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What an engine runs on.

    device          kind of the devices that share the model, of which there are `devices`
    largest_bucket  rows that one step can have
    page_size       KV positions in a page
    unloaded_step   seconds that a step of one row took at the start
    summary         what getting ready came to, for the operator
    """

    device: str = "cpu"
    devices: int = 1
    largest_bucket: int = 64
    page_size: int = 16
    unloaded_step: float = 0.0
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server serves: a started engine, its model, and what it runs on."""

    engine: Engine
    model: ServedModel
    platform: Platform = field(default_factory=Platform)


Loader = Callable[[ServerConfig, Watcher], Served]
"""Loads, compiles and starts everything; may take minutes. The watcher is told of every step."""
