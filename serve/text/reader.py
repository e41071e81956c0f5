"""Token ids to text, token by token: what has been read never changes.

All that `TextReader` gives out for a sequence, to its end, equals the decoding of the whole sequence at once.
Bytes that are not a character yet wait, and where the tokenizer reads bytes in a row as a whole, they all do.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Protocol

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes
_LOOK_BACK = 256  # tokens: where more in a row have no text, what stands before them does not matter


class Spelling(Protocol):
    """How a tokenizer's ids become text: `model.spelling.Spelling` is one."""

    @property
    def pieces(self) -> Mapping[int, bytes | str]: ...
    @property
    def special(self) -> Mapping[str, int]: ...
    @property
    def byte_runs(self) -> bool: ...
    @property
    def drops_first_space(self) -> bool: ...


class Speller:
    """A spelling with or without the special tokens, for any number of readers.

    whole  the text of the tokens that are whole characters by themselves, where nothing waits for them
    """

    def __init__(self, spelling: Spelling, *, skip_special_tokens: bool) -> None:
        hidden = set(spelling.special.values()) if skip_special_tokens else ()
        self.pieces = {token: piece for token, piece in spelling.pieces.items() if token not in hidden}
        self.whole = dict(self._whole_pieces(joined=spelling.byte_runs))
        self.byte_runs = spelling.byte_runs
        self.drops_first_space = spelling.drops_first_space

    def _whole_pieces(self, *, joined: bool) -> Iterator[tuple[int, str]]:
        """All but parts of characters, and bytes that are `joined` with those beside them."""
        for token, piece in self.pieces.items():
            if isinstance(piece, str):
                yield token, piece
            elif not joined:
                with contextlib.suppress(UnicodeDecodeError):
                    yield token, piece.decode()

    def text(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence."""
        reader = TextReader(self)
        return "".join(reader.push(token) for token in ids) + reader.finish()


class TextReader:
    """Reads one sequence. O(1) amortised for each token.

    before  the ids before the first one, the newest first: as many are looked at as can matter, up to 256
    fresh   a character that the newest token made whole, while it is part of a run of bytes that goes on:
            it is not given out yet, for the next byte may make the whole run unreadable
    """

    __slots__ = ("_drops_space", "_run", "_run_is_readable", "_speller", "_utf8", "_waits", "fresh")

    def __init__(self, speller: Speller, before: Iterable[int] = ()) -> None:
        self._speller = speller
        self._drops_space = speller.drops_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict" if speller.byte_runs else "replace")
        self._run = bytearray()
        self._run_is_readable = True
        self.fresh = ""
        self._waits = True  # perhaps: what stands before the next token may change how it reads
        self._begin_after(before)

    def push(self, token: int) -> str:
        """The text that this token settles; may be empty."""
        if not self._waits:
            text = self._speller.whole.get(token)
            if text is not None:
                return text
        text = self._read(token)
        self._waits = bool(self._drops_space or self._run or self._utf8.getstate()[0])
        return text

    def _read(self, token: int) -> str:
        self.fresh = ""
        piece = self._speller.pieces.get(token)
        if not piece:
            return ""
        if isinstance(piece, str):
            return self._given(self._end_run() + piece)
        if not self._speller.byte_runs:
            return self._given(self._utf8.decode(piece))
        self._run += piece
        if self._run_is_readable:
            try:
                self.fresh = self._utf8.decode(piece)
            except UnicodeDecodeError:
                self._run_is_readable = False
        if self._drops_space and len(self._run) == 1 and self.fresh == " ":
            self.fresh = ""
        return ""

    def settle(self) -> str:
        """All whole characters: those that wait, too. An unfinished one goes on waiting."""
        self.fresh = ""
        unfinished = self._utf8.getstate()[0]
        if not self._run or not self._run_is_readable:
            return self._given(self._end_run())
        whole = bytes(self._run).removesuffix(unfinished)
        self._run = bytearray(unfinished)
        return self._given(whole.decode())

    def finish(self) -> str:
        """All that waits, an unfinished character as unreadable. What comes next begins anew."""
        self.fresh = ""
        rest = self._end_run() if self._speller.byte_runs else self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return self._given(rest)

    def fork(self) -> TextReader:
        """A reader of a sequence that begins like this one."""
        reader = TextReader(self._speller)
        reader._drops_space = self._drops_space
        reader._utf8.setstate(self._utf8.getstate())
        reader._run = self._run.copy()
        reader._run_is_readable = self._run_is_readable
        return reader

    def _given(self, text: str) -> str:
        if self._drops_space and text:
            self._drops_space = False
            return text.removeprefix(" ")
        return text

    def _end_run(self) -> str:
        """The text of the bytes in a row: as a whole, or of none of them."""
        if not self._run:
            return ""
        run, self._run = self._run, bytearray()
        try:
            text = run.decode()
        except UnicodeDecodeError:
            text = _UNREADABLE * len(run)
        self._utf8.reset()
        self._run_is_readable = True
        return text

    def _begin_after(self, before: Iterable[int]) -> None:
        """Take over the character that `before` leaves unfinished."""
        tail = b""
        for token in islice(before, _LOOK_BACK):
            piece = self._speller.pieces.get(token)
            if not piece:
                continue
            self._drops_space = False
            if isinstance(piece, str):
                break
            tail = piece + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        unfinished = decoder.getstate()[0]
        self._utf8.decode(unfinished)
        if self._speller.byte_runs:
            self._run += unfinished
