"""What each token of a tokenizer stands for, so that text can be read token by token.

The `tokenizers` library decodes whole sequences. tokenizer.json says how, in one of two ways: byte-level
tokenizers (Qwen, Llama 3) join the bytes of all tokens, and those like SentencePiece (Llama 2) join words,
whose first space is dropped, and single bytes, which are characters only as a whole run. Both are a table
from tokens to pieces, and two rules, which `serve.text` follows.
https://huggingface.co/docs/tokenizers/api/decoders
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Spelling:
    """How tokens become text.

    pieces             what each id adds: bytes, or characters; an id that is not in it adds nothing
    special            ids of the special tokens, by their texts
    byte_runs          bytes in a row are characters if all of them are, else each is unreadable; otherwise
                       each unreadable part is by itself
    drops_first_space  a space that would begin the whole text is dropped
    """

    pieces: Mapping[int, bytes | str]
    special: Mapping[str, int]
    byte_runs: bool = False
    drops_first_space: bool = False

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> Spelling:
        """Raises ValueError, naming it, for a decoder that does more than the two rules say."""
        written = json.loads(backend.to_str())
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = {token["content"]: token["id"] for token in written["added_tokens"] if token["special"]}
        steps = _steps_of(written, "decoder", "decoders")
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls({token: _bytes_of(text) for text, token in vocabulary.items()}, special)
        words = _WordDecoder(steps)
        return cls(
            {token: words.piece(text) for text, token in vocabulary.items()},
            special,
            byte_runs=words.byte_runs,
            drops_first_space=words.drops_first_space,
        )


class _WordDecoder:
    """Replace, ByteFallback, Fuse and Strip in this order, each of which may be absent."""

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        kinds = [step["type"] for step in steps]
        last = [step for step in steps if step["type"] == "Strip"]
        in_order = re.fullmatch(
            r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?", "".join(f"{k} " for k in kinds)
        )
        plain = all("String" in step["pattern"] for step in steps if step["type"] == "Replace")
        one_space = all((step["content"], step["start"], step["stop"]) == (" ", 1, 0) for step in last)
        if not (kinds and in_order and plain and one_space):
            raise ValueError(
                f"its decoder, {' then '.join(kinds) or 'none'}, cannot be read token by token: ByteLevel "
                "can, and Replace, ByteFallback, Fuse and Strip of the first space"
            )
        self._replaced = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
        self.byte_runs = "ByteFallback" in kinds
        self.drops_first_space = bool(last)

    def piece(self, text: str) -> bytes | str:
        for old, new in self._replaced:
            text = text.replace(old, new)
        if self.byte_runs and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        return text


def _characters_of_bytes() -> dict[str, int]:
    """The printable character by which byte-level tokenizers write each byte, as GPT-2 began it."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _characters_of_bytes()


def _bytes_of(text: str) -> bytes:
    """An added token that holds other characters, such as a space, stands for itself."""
    if all(character in _BYTES for character in text):
        return bytes(_BYTES[character] for character in text)
    return text.encode()


def without_first_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for text that goes on: it puts no space first, and special tokens take none away."""
    as_it_is = backend.to_str()
    written = json.loads(as_it_is)
    normalizers = _steps_of(written, "normalizer", "normalizers")
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    if len(kept) < len(normalizers):
        written["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in _steps_of(written, "pre_tokenizer", "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for token in written["added_tokens"]:
        token["lstrip"] = token["rstrip"] = False
    if written == json.loads(as_it_is):
        return backend
    return tokenizers.Tokenizer.from_str(json.dumps(written))


def _steps_of(written: dict[str, Any], name: str, inner: str) -> list[dict[str, Any]]:
    step = written[name]
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]
