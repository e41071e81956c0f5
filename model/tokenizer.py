"""Tokenizer: text to token ids and back, and chats to text, by what a model folder says.

Reads `tokenizer.json` (the `tokenizers` library) and the checkpoint's own chat template, which is a program
from elsewhere and runs in jinja2's sandbox, with the names that transformers gives to templates:
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

from model.spelling import Spelling, without_first_space


class TokenizerError(ValueError):
    """A model folder's tokenizer or chat template is missing or unreadable."""


class ChatError(ValueError):
    """These messages cannot be rendered: the model has no chat template, or its template refuses them."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Prompts and chats to ids, and what ids stand for.

    continuing      the backend for text that goes on from other text
    spelling        what each id stands for in a text
    eos_ids         tokens that end a text, from generation_config.json, config.json and the tokenizer
    special_tokens  what the template may name: {"bos_token": "<s>", ...}
    """

    backend: tokenizers.Tokenizer
    continuing: tokenizers.Tokenizer
    spelling: Spelling
    eos_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] | None = None
    chat_template: jinja2.Template | None = None

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Raises TokenizerError naming the file at fault."""
        folder = Path(path)
        backend = _read_backend(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(config)
        return cls(
            backend=backend,
            continuing=without_first_space(backend),
            spelling=_spelling(folder / "tokenizer.json", backend),
            eos_ids=_eos_ids(folder, backend, special),
            special_tokens=special,
            chat_template=_read_chat_template(folder, config),
        )

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
        except Exception as error:  # a template is a foreign program: it may fail in any way
            raise ChatError(f"the model's chat template refuses these messages: {error}") from error


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.exists():
        raise TokenizerError(f"no {path.name} in {path.parent}: a model folder needs one")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"cannot read {path}: {error}") from error
    backend.no_truncation()  # a file may ask for both; a prompt is never silently cut or padded
    backend.no_padding()
    return backend


def _spelling(path: Path, backend: tokenizers.Tokenizer) -> Spelling:
    try:
        return Spelling.of(backend)
    except ValueError as error:
        raise TokenizerError(f"cannot use {path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, or an empty one where there is no such file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every `*_token` of tokenizer_config.json; it is written as a string or as {"content": string}."""
    special = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            special[name] = content
    return special


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> tuple[int, ...]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    own = backend.token_to_id(special.get("eos_token", ""))
    return tuple(dict.fromkeys(ids if own is None else [*ids, own]))


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    """`chat_template.jinja`, or the `chat_template` of tokenizer_config.json: text, or named texts."""
    path = folder / "chat_template.jinja"
    if path.exists():
        source = path.read_text(encoding="utf-8")
    else:
        path = folder / "tokenizer_config.json"
        source = config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template in {path} is not valid jinja: {error}") from error


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
