"""Tokens one by one, as the library decodes them together, and text that goes on from other text."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from model.spelling import Spelling, without_first_space
from tests.families import FAMILIES, family
from tests.serve.text.strategies import texts

families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_every_token_stands_for_what_the_library_shows_of_it(name):
    tokenizer, unreadable = family(name), 0
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.spelling.pieces[token]
        shown = tokenizer.decode([token])
        if isinstance(piece, str):
            assert piece.removeprefix(" ") == shown
        else:
            assert piece.decode(errors="replace").removeprefix(" " if name == "llama2" else "") == shown
            unreadable += "�" in shown
    assert unreadable > 100


def test_special_tokens_are_known_by_their_text():
    assert family("llama2").spelling.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert set(family("qwen").spelling.special) == {"<|im_start|>", "<|im_end|>"}


def test_the_families_differ_in_two_rules():
    spellings = {name: family(name).spelling for name in FAMILIES}
    rules = {name: (each.byte_runs, each.drops_first_space) for name, each in spellings.items()}
    assert rules == {"qwen": (False, False), "llama2": (True, True), "llama3": (False, False)}


@families
def test_an_added_token_with_a_space_stands_for_itself(name):
    backend = tokenizers.Tokenizer.from_str(family(name).backend.to_str())
    backend.add_tokens([AddedToken("zwei Worte", special=False)])
    piece = Spelling.of(backend).pieces[backend.token_to_id("zwei Worte")]
    assert piece in ("zwei Worte", b"zwei Worte")


REFUSED = {
    "none": None,
    "WordPiece": decoders.WordPiece(),
    "Metaspace": decoders.Metaspace(),
    "Strip then Fuse": decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
    "ByteFallback then Replace": decoders.Sequence([decoders.ByteFallback(), decoders.Replace("▁", " ")]),
    "Fuse then Strip": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "Replace": decoders.Replace(tokenizers.Regex("a+"), " "),
}


@pytest.mark.parametrize("decoder", REFUSED.values(), ids=REFUSED)
def test_a_decoder_that_cannot_be_read_token_by_token_is_refused(decoder):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ValueError, match="cannot be read token by token"):
        Spelling.of(backend)


@families
@settings(max_examples=50)
@given(before=texts.filter(str.strip), text=texts)
def test_text_that_goes_on_adds_itself_and_nothing_else(name, before, text):
    tokenizer = family(name)
    if name == "qwen":  # its texts are normalized: the one thing that a continuation does to them
        text = normalizers.NFC().normalize_str(text)
    ids = tokenizer.encode(before)
    added = tokenizer.encode_continuation(text)
    assert tokenizer.decode([*ids, *added]) == tokenizer.decode(ids) + text


def test_only_a_prompt_begins_with_a_space():
    llama2 = family("llama2")
    assert llama2.encode("cat") == llama2.encode_continuation(" cat") != llama2.encode_continuation("cat")


def test_a_tokenizer_that_adds_no_space_goes_on_as_it_begins():
    backend = family("qwen").backend
    assert without_first_space(backend) is backend


@pytest.mark.parametrize(
    "first",
    [
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)]),
    ],
    ids=["metaspace", "byte level", "in a sequence"],
)
def test_whatever_would_put_a_space_first_does_not(first):
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "▁", "Ġ", "a"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = first
    assert len(backend.encode("a").ids) == 2
    assert without_first_space(backend).encode("a").ids == [3]


def test_a_special_token_in_text_that_goes_on_takes_no_space_away():
    backend = tokenizers.Tokenizer.from_str(family("llama2").backend.to_str())
    backend.add_special_tokens([AddedToken("<end>", lstrip=True, rstrip=True, special=True)])
    ids = without_first_space(backend).encode("a <end> a", add_special_tokens=False).ids
    assert backend.decode(ids, skip_special_tokens=False) == "a <end> a"
