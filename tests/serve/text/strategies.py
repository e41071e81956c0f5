"""Texts in several scripts, and ids that no text would give."""

from __future__ import annotations

from hypothesis import strategies as st

from model.tokenizer import Tokenizer

SCRIPTS = "the cat END. abc:!\n\t éß日本語한🙂👩‍👧🏳️Пм世\u0301"
texts = st.text(st.sampled_from(SCRIPTS) | st.characters(codec="utf-8", exclude_characters="�"), max_size=40)


def encoded(tokenizer: Tokenizer, texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[int]]:
    """By the library itself: the checks of our types draw random numbers, which a strategy must not."""
    return texts.map(lambda text: tokenizer.continuing.encode(text, add_special_tokens=False).ids)


def ids(tokenizer: Tokenizer, max_size: int = 60) -> st.SearchStrategy[list[int]]:
    """Any ids: parts of characters, special tokens, and some that the vocabulary has not."""
    size = tokenizer.vocab_size
    bytes_of = [token for token, piece in tokenizer.spelling.pieces.items() if isinstance(piece, bytes)]
    spelled, of_bytes = encoded(tokenizer, texts), encoded(tokenizer, st.text("日本🙂é", max_size=4))
    one = st.lists(st.integers(0, size + 9) | st.sampled_from(bytes_of), min_size=1, max_size=4)
    return st.lists(spelled | of_bytes | one, max_size=6).map(
        lambda parts: [token for part in parts for token in part][:max_size]
    )
