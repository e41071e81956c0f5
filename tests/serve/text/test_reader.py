"""Reading token by token gives what decoding at once gives, for every family of tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.text.reader import Speller, TextReader
from tests.families import FAMILIES, family
from tests.serve.text import strategies

both = pytest.mark.parametrize("skip", [True, False], ids=["without special tokens", "with special tokens"])
families = pytest.mark.parametrize("name", FAMILIES)


def speller(name: str, *, skip: bool = True) -> Speller:
    return Speller(family(name).spelling, skip_special_tokens=skip)


def decoded(name: str, ids, *, skip: bool = True) -> str:
    """What the library makes of them at once."""
    return family(name).decode(ids, skip_special_tokens=skip)


@both
@families
@settings(max_examples=50)
@given(data=st.data())
def test_at_every_token_what_was_read_and_what_would_end_it_are_the_whole_text(name, skip, data):
    ids = data.draw(strategies.ids(family(name), 30))
    reader, text = TextReader(speller(name, skip=skip)), ""
    for end, token in enumerate(ids, 1):
        text += reader.push(token)
        assert text + reader.fork().finish() == decoded(name, ids[:end], skip=skip)


@families
@settings(max_examples=50)
@given(text=strategies.texts)
def test_no_piece_of_a_real_text_holds_half_a_character(name, text):
    ids = family(name).encode_continuation(text)
    reader = TextReader(speller(name), before=[*family(name).encode("a")])
    pieces = [*(reader.push(token) for token in ids), reader.finish()]
    assert "".join(pieces) == decoded(name, family(name).encode("a") + ids)[1:]
    assert not any("�" in piece for piece in pieces)


@families
@settings(max_examples=50)
@given(data=st.data())
def test_after_a_context_it_reads_what_the_tokens_add(name, data):
    context = family(name).encode(data.draw(strategies.texts.filter(str.strip)))
    ids = data.draw(strategies.encoded(family(name), strategies.texts))
    reader = TextReader(speller(name), before=reversed(context))
    text = "".join(reader.push(token) for token in ids) + reader.finish()
    assert decoded(name, context) + text == decoded(name, context + ids)


@families
@settings(max_examples=50)
@given(text=st.text(st.sampled_from("本🙂語"), min_size=1, max_size=5), data=st.data())
def test_a_character_that_the_context_leaves_unfinished_is_completed(name, text, data):
    ids = family(name).encode_continuation("a" + text)
    cut = data.draw(st.integers(1, len(ids)))
    first = TextReader(speller(name))
    before = "".join(first.push(token) for token in ids[:cut]) + first.settle()
    for second in (first, TextReader(speller(name), before=reversed(ids[:cut]))):
        assert before + "".join(second.push(t) for t in ids[cut:]) + second.finish() == "a" + text


def test_several_characters_of_single_bytes_come_when_their_run_has_ended():
    llama2 = family("llama2")
    run, word = llama2.encode_continuation("🦙🦙é"[:2]), llama2.encode_continuation(" cat")
    reader = TextReader(speller("llama2"), before=llama2.encode("a"))
    assert [reader.push(token) for token in [*run, *word]] == [""] * 8 + ["🦙🦙 cat"]


def test_a_run_that_is_no_text_is_unreadable_byte_by_byte():
    llama2 = family("llama2")
    ids = [*llama2.encode_continuation("🦙"), 3 + 0xFF, *llama2.encode_continuation("a")]
    reader = TextReader(speller("llama2"), before=llama2.encode("a"))
    assert "".join(reader.push(token) for token in ids) == "�" * 5 + "a"


def test_the_first_space_of_all_is_no_text_and_every_other_one_is():
    the = family("llama2").backend.token_to_id("▁the")
    reader = TextReader(speller("llama2"))
    assert [reader.push(token) for token in (the, the)] == ["the", " the"]
    assert TextReader(speller("llama2"), before=[1]).push(the) == "the", "a special token is no text"
    assert TextReader(speller("llama2"), before=[the]).push(the) == " the"


@families
def test_ids_that_the_tokenizer_has_not_read_as_nothing(name):
    cat = family(name).encode_continuation("cat")
    beyond = [family(name).vocab_size + n for n in range(5)]
    ids = [beyond[0], *[i for token in cat for i in (token, *beyond)]]
    reader = TextReader(speller(name))
    assert "".join(reader.push(token) for token in ids) + reader.finish() == "cat"


@families
def test_a_forked_reader_reads_on_by_itself(name):
    ids = family(name).encode_continuation("a🦙b")
    whole = TextReader(speller(name))
    text = "".join(whole.push(token) for token in ids[:3])
    branch = whole.fork()
    assert text + "".join(branch.push(t) for t in ids[3:]) + branch.finish() == "a🦙b"
    assert text + "".join(whole.push(t) for t in ids[3:]) + whole.finish() == "a🦙b"


@families
def test_a_whole_sequence_can_be_read_at_once(name):
    ids = family(name).encode("the 日本 cat")
    for skip in (True, False):
        assert speller(name, skip=skip).text(ids) == decoded(name, ids, skip=skip)


class Counted(dict):
    looked_up = 0

    def get(self, *key):
        self.looked_up += 1
        return super().get(*key)


@families
def test_a_long_context_is_looked_at_as_far_as_it_matters(name):
    spells, context = speller(name), family(name).encode_continuation("the cat " * 1000)
    spells.pieces = Counted(spells.pieces)
    TextReader(spells, reversed(context))
    assert spells.pieces.looked_up <= 4


def test_a_long_run_of_bytes_comes_out_whole():
    spells, run = speller("llama2"), [*"🦙".encode()] * 20_000
    reader = TextReader(spells, before=[family("llama2").backend.token_to_id("a")])
    fresh = [reader.push(3 + byte) or reader.fresh for byte in run]
    assert "".join(fresh) == "🦙" * 20_000 == reader.settle()


def test_after_bytes_that_are_unreadable_a_fork_settles_what_its_parent_does():
    byte = {piece: token for token, piece in family("llama2").spelling.pieces.items() if piece == b"\xff"}
    reader = TextReader(speller("llama2"), before=family("llama2").encode("a"))
    assert reader.push(byte[b"\xff"]) == ""
    branch = reader.fork()
    assert branch.settle() == reader.settle() == "�"


def test_where_nothing_waits_a_whole_character_is_looked_up_and_not_read():
    spelled = speller("qwen")
    token = next(token for token, text in spelled.whole.items() if text == "a")
    reader = TextReader(spelled)
    assert reader.push(token) == "a"
    spelled.pieces = {}
    assert reader.push(token) == "a"


def test_of_a_context_without_text_it_looks_at_no_more_than_a_few_hundred_tokens():
    special = next(iter(family("qwen").spelling.special.values()))
    looked_at = 0

    def context():
        nonlocal looked_at
        while looked_at < 100_000:
            looked_at += 1
            yield special

    assert TextReader(speller("qwen"), before=context()).push(special) == ""
    assert looked_at <= 300
