"""A tokenizer as the scheduler knows one: `scheduler.cursor.Codec`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from serve.text.reader import Speller, Spelling, TextReader


class Tokenizer(Protocol):
    @property
    def spelling(self) -> Spelling: ...
    def encode_continuation(self, text: str) -> list[int]: ...


class TextCodec:
    """Forced text and tags to ids, and ids to text, token by token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spellers = {
            kept: Speller(tokenizer.spelling, skip_special_tokens=not kept) for kept in (False, True)
        }

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode_continuation(text)

    def reader(self, before: Iterable[int], *, special_tokens: bool) -> TextReader:
        return TextReader(self._spellers[special_tokens], before)
