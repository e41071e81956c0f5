"""A branch's text comes in whole characters, without stop strings, and stage after stage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.search import Search
from serve.text.detokenizer import Detokenizer
from serve.text.reader import Speller, TextReader
from tests.families import FAMILIES, family
from tests.serve.fakes import EOS, ByteTokenizer
from tests.serve.text import strategies

families = pytest.mark.parametrize("name", FAMILIES)
BYTES = Speller(ByteTokenizer.spelling, skip_special_tokens=True)


def detokenizer(speller: Speller = BYTES, *, stops=(), before=()) -> Detokenizer:
    return Detokenizer(TextReader(speller, reversed(before)), stops)


def speller(name: str) -> Speller:
    return Speller(family(name).spelling, skip_special_tokens=True)


def pieces(text: Detokenizer, ids) -> list[str]:
    return [*(text.push(token) for token in ids), text.finish()]


@families
@settings(max_examples=50)
@given(data=st.data())
def test_stop_strings_that_do_not_end_a_stage_change_nothing(name, data):
    ids = data.draw(strategies.ids(family(name), 40))
    stops = data.draw(st.lists(st.text("abthe \n�é", min_size=1, max_size=4), max_size=3))
    assert "".join(pieces(detokenizer(speller(name), stops=stops), ids)) == family(name).decode(
        ids, skip_special_tokens=True
    )


@families
@settings(max_examples=50)
@given(data=st.data())
def test_what_a_stop_string_matched_is_never_shown_unless_asked_for(name, data):
    """And all before it is, whatever else its last token holds."""
    tokenizer, spells = family(name), speller(name)
    before = tokenizer.encode("a")
    ids = tokenizer.encode_continuation(data.draw(strategies.texts.filter(bool)))
    whole = spells.text([*before, *ids])[1:]
    at = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[at : at + data.draw(st.integers(1, 4))]
    others = data.draw(st.lists(strategies.texts.filter(bool), max_size=2))
    shown, search = (
        detokenizer(spells, stops=[*others, stop], before=before),
        Search([stop], TextReader(spells, reversed(before))),
    )
    text = ""
    for token in ids:
        text += shown.push(token)
        assert stop not in text
        if found := search.push(token):
            break
    end = whole.index(stop)
    include = data.draw(st.booleans())
    assert text + shown.stop(found[0].cut, include * len(stop)) == whole[: end + include * len(stop)]


@pytest.mark.parametrize(("kept", "expected"), [(0, "the "), (2, "the ca")])
def test_what_follows_the_stop_string_in_its_token_is_cut(kept, expected):
    llama2 = family("llama2")
    text = detokenizer(speller("llama2"), stops=["ca"])
    shown = "".join(text.push(token) for token in llama2.encode("the cat"))
    assert shown + text.stop(len("cat"), kept) == expected


def test_text_that_only_begins_like_a_stop_string_is_shown_as_soon_as_that_is_clear():
    text = detokenizer(stops=["###"])
    assert [text.push(token) for token in b"a##b#"] == ["a", "", "", "##b", ""]
    assert text.finish() == "#"


def test_a_whole_stop_string_is_shown_when_decoding_goes_on_past_it():
    """It may be the stop string of another stage."""
    text = detokenizer(stops=["ab"])
    assert [text.push(token) for token in (ord("a"), EOS, ord("b"), ord("c"))] == ["", "", "", "abc"]


def test_split_characters_wait_for_their_rest():
    assert [*map(detokenizer().push, "é🙂".encode())] == ["", "é", "", "", "", "🙂"]


def test_a_character_that_never_ends_is_shown_as_unreadable_at_the_end():
    assert pieces(detokenizer(), "a🙂".encode()[:-1]) == ["a", "", "", "", "�"]


def test_a_character_goes_on_in_the_next_stage_or_in_each_branch():
    text, character = detokenizer(), "🙂".encode()
    assert [*map(text.push, b"a" + character[:2]), text.pause()] == ["a", "", "", ""]
    branches = [text.fork(), text.fork()]
    for branch in (text, *branches):
        assert [branch.push(token) for token in character[2:]] == ["", "🙂"]


def test_held_text_is_given_out_before_the_next_stage():
    text = detokenizer(stops=["##"])
    assert (text.push(ord("#")), text.pause(), text.push(ord("#"))) == ("", "#", "")
    assert text.finish() == "#"


@families
def test_forced_text_is_not_held_back_and_complete(name):
    forced = family(name).encode_continuation(" ## 🦙")
    text = detokenizer(speller(name), stops=["##", "🦙"], before=family(name).encode("a"))
    assert text.force(forced) == " ## 🦙"
