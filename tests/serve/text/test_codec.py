"""Stop strings, looked for in what any family of tokenizers makes of a sequence's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.search import Match, Search
from serve.text.codec import TextCodec
from serve.text.reader import Speller
from tests.families import FAMILIES, family
from tests.serve.text import strategies

families = pytest.mark.parametrize("name", FAMILIES)


def codec(name: str) -> TextCodec:
    return TextCodec(family(name))


def spoken(name: str, before: Sequence[int], ids: Sequence[int], *, special_tokens: bool) -> str:
    """What `ids` add to the text of the ids before them, by decoding all at once."""
    decode, skip = family(name).decode, not special_tokens
    return decode([*before, *ids], skip_special_tokens=skip)[len(decode(before, skip_special_tokens=skip)) :]


def by_force(texts: Sequence[str], stops: Sequence[str]) -> tuple[int, Match] | None:
    """The first of the texts in which a stop stands, and the one that begins first there."""
    for end, text in enumerate(texts, 1):
        found = [(text.find(stop), order) for order, stop in enumerate(stops) if stop in text]
        if found:
            at, order = min(found)
            return end, Match(stops[order], len(text.rstrip("�")) - at)
    return None


@pytest.mark.parametrize("special_tokens", [True, False])
@families
@settings(max_examples=50)
@given(data=st.data())
def test_a_match_is_where_searching_the_text_of_every_prefix_finds_it(name, special_tokens, data):
    before = family(name).encode("a")
    ids = data.draw(strategies.ids(family(name), 30))
    texts = [spoken(name, before, ids[:end], special_tokens=special_tokens) for end in range(1, len(ids) + 1)]
    readable = [text for text in texts if text.strip("�")]
    parts = st.sampled_from(readable or ["x"]).flatmap(
        lambda text: st.tuples(st.integers(0, len(text)), st.integers(1, 5)).map(
            lambda cut: text[cut[0] : cut[0] + cut[1]].replace("�", "")
        )
    )
    stops = data.draw(st.lists((parts | strategies.texts).filter(bool), min_size=1, max_size=3, unique=True))
    search = Search(stops, codec(name).reader(reversed(before), special_tokens=special_tokens))
    found = next(((end, m[0]) for end, token in enumerate(ids, 1) if (m := search.push(token))), None)
    expected = by_force(texts, stops)
    assert (found and found[0]) == (expected and expected[0])
    if found and expected and not texts[found[0] - 1].endswith("�"):
        assert found[1] == expected[1]


def stopped_after(name: str, pieces: Sequence[str | int], stop: str) -> int | None:
    """Tokens until the string has come, after a context. Pieces are the vocabulary's own, or ids."""
    known = family(name).backend.token_to_id
    search = Search([stop], codec(name).reader([known("a")], special_tokens=False))
    for count, piece in enumerate(pieces, 1):
        if search.push(known(piece) if isinstance(piece, str) else piece):
            return count
    return None


@pytest.mark.parametrize(
    ("pieces", "stop", "after"),
    [
        (["▁END", "a"], " END", 1),
        (["▁END", "a"], "END", 1),
        (["a", "▁END", "a"], " END", 2),
        (["a", "▁", "o", "f", "a"], " of", 4),
        (["a", "<0x0A>", "<0x0A>", "a"], "\n\n", 3),
        (["a", *(f"<0x{byte:02X}>" for byte in "本語".encode()), "a"], "語", 7),
        (["a", *(f"<0x{byte:02X}>" for byte in "語本語".encode()), "a"], "本", 7),
        (["a", *(f"<0x{byte:02X}>" for byte in "語".encode()), "日"], "語日", 5),
        (["o", 9999, 9999, 9999, "f"], "of", 5),
        (["o", "<s>", "f"], "of", 3),
        (["<0x20>", "o", "f"], " of", 3),
        (["<0xE6>", "<0xFF>", "o", "f"], "of", 4),
        (["a", "b"], "c", None),
        (["▁the", "▁cat"], "the cat", 2),
    ],
)
def test_a_stop_string_ends_a_sequence_with_the_token_that_completes_it(pieces, stop, after):
    assert stopped_after("llama2", pieces, stop) == after


def test_a_special_token_is_found_by_its_text_where_it_has_one():
    end = family("qwen").spelling.special["<|im_end|>"]
    for special_tokens in (True, False):
        search = Search(["<|im_end|>"], codec("qwen").reader([], special_tokens=special_tokens))
        assert bool(search.push(end)) == special_tokens


@families
def test_forced_text_is_encoded_as_going_on_and_decodes_with_special_tokens(name):
    text = "cat" + next(iter(family(name).spelling.special))
    assert Speller(family(name).spelling, skip_special_tokens=False).text(codec(name).encode(text)) == text
