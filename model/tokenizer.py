"""Tokenizer: text to token ids and back, and chats to text, by what a model folder says.

`tokenizer.json` is read by the `tokenizers` library (model/tokenizer_files.py has all the files that count).
The checkpoint's own chat template is a program from elsewhere: it runs in jinja2's sandbox, with the names
that transformers gives to templates:
https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.settings import one_line, read_optional
from model.spelling import Spelling, without_first_space
from model.tokenizer_files import (
    CONFIG,
    TOKENIZER,
    TokenizerError,
    has_tokenizer,
    read_backend,
    read_chat_template,
    read_eos_ids,
    read_special_tokens,
)


class ChatError(ValueError):
    """These messages cannot be rendered: the model has no chat template, or its template refuses them."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Prompts and chats to ids, and what ids stand for.

    continuing      the backend for text that goes on from other text
    spelling        what each id stands for in a text
    eos_ids         tokens that end a text, from generation_config.json, config.json and the tokenizer
    special_tokens  what the template may name: {"bos_token": "<s>", ...}
    notes           what an operator should hear: that there is no tokenizer
    """

    backend: tokenizers.Tokenizer
    continuing: tokenizers.Tokenizer
    spelling: Spelling
    eos_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] | None = None
    chat_template: jinja2.Template | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Raises CheckpointError naming the file at fault."""
        folder = Path(path)
        if not has_tokenizer(folder):
            return cls.without_tokens(read_eos_ids(folder), _without(folder))
        backend, config = read_backend(folder), read_optional(folder / CONFIG)
        special = read_special_tokens(folder, config, backend)
        own = backend.token_to_id(special.get("eos_token", ""))
        ids = dict.fromkeys((*read_eos_ids(folder), *(() if own is None else (own,))))
        template = read_chat_template(folder, config)
        return cls(
            backend=backend,
            continuing=without_first_space(backend),
            spelling=_spelling(folder / TOKENIZER, backend),
            eos_ids=tuple(ids),
            special_tokens=special,
            chat_template=template and _compiled(*template),
        )

    @classmethod
    def without_tokens(cls, eos_ids: tuple[int, ...], note: str) -> Tokenizer:
        """What stands in where a folder has no tokenizer: texts have no ids, and ids read as nothing."""
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        return cls(
            backend=backend, continuing=backend, spelling=Spelling({}, {}), eos_ids=eos_ids, notes=(note,)
        )

    @property
    def supports_text(self) -> bool:
        """Whether the folder has a tokenizer."""
        return not self.notes

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's own vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def supports_chat(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Special tokens that are spelled out in the text become their ids; none are added by default."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of text that goes on from other text: read after it, they add this text and no space."""
        return self.continuing.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Bytes that are not (or not yet) whole UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The prompt for `messages` (each with a role and a content), by the model's own template.

        `options` go to the template by name, such as Qwen3's `enable_thinking`. Raises ChatError.
        """
        if self.chat_template is None:
            raise ChatError("this model has no chat template: send its prompt as text or token ids")
        names = {"tools": None, "documents": None, **(self.special_tokens or {}), **options}
        try:
            return self.chat_template.render(
                names, messages=messages, add_generation_prompt=add_generation_prompt
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a foreign program: it may fail in any way
            raise ChatError(f"the model's chat template refuses these messages: {error}") from error


def _without(folder: Path) -> str:
    others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / name).exists()]
    beside = f" ({', '.join(others)} is not read)" if others else ""
    return f"no tokenizer.json in {folder}{beside}: token ids are served, and texts are refused"


def _spelling(path: Path, backend: tokenizers.Tokenizer) -> Spelling:
    try:
        return Spelling.of(backend)
    except ValueError as error:
        raise TokenizerError(f"cannot use {path}: {error}") from error


def _compiled(source: str, path: Path) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except Exception as error:  # a template is a foreign program: it may be wrong in any way
        raise TokenizerError(f"the chat template in {path} is not valid jinja: {one_line(error)}") from error


class _Generation(Extension):
    """`{% generation %}`, with which templates mark the assistant's words for training, changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
