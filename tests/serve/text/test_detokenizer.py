"""Text comes in whole characters, without stop strings, and adds up."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

import model.tiny
from model.tokenizer import Tokenizer
from serve.text.detokenizer import Detokenizer, Speller
from tests.serve.fakes import EOS, ByteTokenizer

CORPUS = [
    "the cat sat on the mat",
    "Straße, naïve café, “quotes”",
    "日本語のテキスト",
    "🙂🙃 👩‍👩‍👧 🏳️‍🌈",
    "  spaces\n\n",
]


class ByteLevel:
    """A byte-level BPE tokenizer, made like Qwen's and SmolLM's."""

    def __init__(self) -> None:
        self._tokenizer = tokenizers.Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator(CORPUS, trainer)
        self.size = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class WordPieces:
    """Marks words by a leading space, and drops the first: like SentencePiece."""

    words = ("▁the", "▁cat", "▁", "s", "<0xE6>", "<0x97>", "<0xA5>", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>")

    def __init__(self) -> None:
        vocab = {word: index for index, word in enumerate(self.words)}
        self._tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="▁"))
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        self._tokenizer.decoder = decoders.Sequence(steps)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@cache
def byte_level() -> ByteLevel:
    return ByteLevel()


@cache
def embedded() -> Tokenizer:
    """The default model's own."""
    return Tokenizer.from_folder(Path(model.tiny.__file__).parent)


def pieces(detokenizer: Detokenizer, ids, **end) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish(**end)]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("make", [byte_level, ByteTokenizer, embedded])
@given(data=st.data())
def test_the_pieces_of_any_tokens_add_up_to_the_text_of_all(make, skip, data):
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, 299) | st.integers(0, 2000), max_size=120))
    speller = Speller(tokenizer, skip_special_tokens=skip)
    assert "".join(pieces(Detokenizer(speller), ids)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("make", [byte_level, embedded])
@given(text=st.text(st.characters(exclude_characters="�", codec="utf-8"), max_size=60))
def test_no_piece_of_a_real_text_holds_half_a_character(make, text):
    tokenizer = make()
    speller = Speller(tokenizer, skip_special_tokens=True)
    got = pieces(Detokenizer(speller), tokenizer.encode(text))
    assert "".join(got) == text
    assert not any("�" in piece for piece in got)


@given(
    ids=st.lists(st.integers(0, 299), max_size=60),
    context=st.lists(st.integers(0, 299), max_size=40),
    stops=st.lists(st.text("ab\n�é", min_size=1, max_size=4), max_size=3),
)
def test_context_and_stop_strings_that_do_not_come_change_nothing(ids, context, stops):
    tokenizer = ByteTokenizer()
    speller = Speller(tokenizer, skip_special_tokens=True)
    got = pieces(Detokenizer(speller, stops=stops, context=context), ids)
    assert "".join(got) == tokenizer.decode(ids, skip_special_tokens=True)


@given(
    before=st.text("abX ", max_size=20),
    stop=st.sampled_from(["X", "ab", "aba", "a b", "X X", "é!"]),
    others=st.lists(st.sampled_from(["aXb", "b b", "XX"]), max_size=2),
    spill=st.text("cd", max_size=3),
    include=st.booleans(),
)
def test_a_stop_string_is_never_shown_unless_asked_for(before, stop, others, spill, include):
    """The scheduler ends the stage at the token that completes the string, whatever else the token holds."""
    before = (before + "\0").partition(stop)[0].removesuffix("\0")
    head = (before + stop).index(stop)
    text = (before + stop)[: head + len(stop)]
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(Speller(tokenizer, skip_special_tokens=True), stops=[*others, stop])
    got = [detokenizer.push(token) for token in text.encode()]
    assert stop not in "".join(got)
    got.append(detokenizer.finish(stop, include_stop=include))
    assert "".join(got) == (text if include else text[:head])


def test_what_follows_the_stop_string_in_its_token_is_cut():
    tokenizer = byte_level()
    ids = tokenizer.encode("the cat")  # one token for "the", one for " cat"
    for include, expected in ((False, "the "), (True, "the ca")):
        detokenizer = Detokenizer(Speller(tokenizer, skip_special_tokens=True), stops=["ca"])
        assert "".join(pieces(detokenizer, ids, stop="ca", include_stop=include)) == expected


def test_text_that_only_begins_like_a_stop_string_is_shown_as_soon_as_that_is_clear():
    detokenizer = Detokenizer(Speller(ByteTokenizer(), skip_special_tokens=True), stops=["###"])
    assert [detokenizer.push(token) for token in b"a##b#"] == ["a", "", "", "##b", ""]
    assert detokenizer.finish() == "#"


def test_a_whole_stop_string_is_shown_when_decoding_goes_on_past_it():
    """The scheduler looks at special tokens too, and may see no match where the shown text has one."""
    detokenizer = Detokenizer(Speller(ByteTokenizer(), skip_special_tokens=True), stops=["ab"])
    assert [detokenizer.push(token) for token in (ord("a"), EOS, ord("b"), ord("c"))] == ["", "", "", "abc"]


def test_split_characters_wait_for_their_rest():
    detokenizer = Detokenizer(Speller(ByteTokenizer(), skip_special_tokens=True))
    assert [detokenizer.push(token) for token in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_a_character_that_never_ends_is_shown_as_unreadable_at_the_end():
    detokenizer = Detokenizer(Speller(ByteTokenizer(), skip_special_tokens=True))
    assert [detokenizer.push(token) for token in "a🙂".encode()[:-1]] == ["a", "", "", ""]
    assert detokenizer.finish() == "�"


@given(ids=st.lists(st.sampled_from(range(len(WordPieces.words))), max_size=60))
def test_words_marked_by_spaces_keep_them_after_a_context(ids):
    """Without a context the first space is the sequence's beginning, and dropped."""
    tokenizer = WordPieces()
    speller = Speller(tokenizer, skip_special_tokens=True)
    ids = [token for token in ids if token < 4]
    got = pieces(Detokenizer(speller, context=[0, 1]), ids)
    assert "".join(got) == tokenizer.decode([0, 1, *ids])[len("the cat") :]
    assert "".join(pieces(Detokenizer(speller), ids)) == tokenizer.decode(ids)


def test_a_context_with_an_unreadable_byte_in_it_keeps_the_space_after_it():
    """Only one that ends in half a character is of no use."""
    speller = Speller(WordPieces(), skip_special_tokens=True)
    assert Detokenizer(speller, context=[4, 0]).push(1) == " cat"


def test_bytes_that_stand_for_themselves_become_characters():
    tokenizer = WordPieces()
    detokenizer = Detokenizer(Speller(tokenizer, skip_special_tokens=True), context=[0])
    assert [detokenizer.push(token) for token in (1, 4, 5, 6, 0)] == [" cat", "", "", "日", " the"]


def test_a_character_of_four_such_bytes_waits_for_all_of_them():
    """The decoder shows an unreadable sign for each of them until the last has come."""
    detokenizer = Detokenizer(Speller(WordPieces(), skip_special_tokens=True), context=[0])
    assert [detokenizer.push(token) for token in (7, 8, 9, 10, 3)] == ["", "", "", "🙂", "s"]


class Counting(ByteTokenizer):
    """Counts the tokens that are decoded, and the calls."""

    def __init__(self) -> None:
        self.decoded = self.calls = 0

    def decode(self, ids, skip_special_tokens=False):
        self.decoded += len(ids)
        self.calls += 1
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize(
    "ids",
    [list(b"plain text " * 400), [0x80] * 4000, list("𒀀".encode() * 1000), [EOS] * 4000, [299, 0xF0] * 2000],
    ids=["text", "stray bytes", "four-byte characters", "special tokens", "unused ids"],
)
def test_a_token_costs_the_same_however_long_the_text(ids):
    tokenizer = Counting()
    pieces(Detokenizer(Speller(tokenizer, skip_special_tokens=True), stops=["###"]), ids)
    assert tokenizer.decoded < 40 * len(ids)


def test_whole_characters_that_were_spelled_before_are_not_decoded_again():
    tokenizer = Counting()
    speller = Speller(tokenizer, skip_special_tokens=True)
    pieces(Detokenizer(speller), list(b"plain text"))
    known, again = tokenizer.calls, Detokenizer(speller)
    again.push(ord("p"))
    first = tokenizer.calls - known
    assert "".join(again.push(token) for token in b"lain text" * 50) == "lain text" * 50
    assert tokenizer.calls - known == first, "only what nothing comes before is decoded"
