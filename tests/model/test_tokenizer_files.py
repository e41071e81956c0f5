"""What the files say of tokens that were added to a tokenizer, and of those that are special."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from model.tokenizer_files import TokenizerError, read_backend, read_eos_ids, read_special_tokens

VOCABULARY = {"a": 0, "b": 1, "[x]": 2, "[y]": 3}


@pytest.fixture
def backend() -> Tokenizer:
    made = Tokenizer(WordLevel(VOCABULARY, unk_token="a"))
    made.pre_tokenizer = Whitespace()
    return made


def specials(backend: Tokenizer) -> dict[str, bool]:
    """Of every added token, whether it is special."""
    return {token.content: token.special for token in backend.get_added_tokens_decoder().values()}


def decoder(**tokens: Any) -> dict[str, Any]:
    return {"added_tokens_decoder": tokens}


def test_a_prompt_is_neither_cut_nor_padded_though_the_file_asks_for_both(
    tmp_path: Path, backend: Tokenizer
) -> None:
    backend.enable_padding(length=8)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert read_backend(tmp_path).encode("a b b").ids == [0, 1, 1]


def test_a_token_of_the_vocabulary_becomes_special_where_a_file_says_so(
    tmp_path: Path, backend: Tokenizer
) -> None:
    listed = decoder(**{"2": {"content": "[x]", "special": True}})
    read_special_tokens(tmp_path, listed, backend)
    assert specials(backend) == {"[x]": True}


def test_a_token_that_was_added_as_ordinary_stays_so_and_others_become_special(
    tmp_path: Path, backend: Tokenizer
) -> None:
    listed = decoder(**{"4": {"content": "[z]", "special": False}})
    read_special_tokens(tmp_path, listed | {"additional_special_tokens": ["[z]", "[y]", "[none]"]}, backend)
    assert specials(backend) == {"[z]": False, "[y]": True}


def test_new_tokens_get_the_ids_that_they_are_listed_with_in_any_order(
    tmp_path: Path, backend: Tokenizer
) -> None:
    read_special_tokens(tmp_path, decoder(**{"5": {"content": "[q]"}, "4": {"content": "[p]"}}), backend)
    assert [backend.token_to_id(token) for token in ("[p]", "[q]")] == [4, 5]
    with pytest.raises(TokenizerError, match=r"disagree about '\[r\]': expected id 9, found 6"):
        read_special_tokens(tmp_path, decoder(**{"9": {"content": "[r]"}}), backend)


def test_tokens_of_the_older_file_are_found_in_normalized_text(tmp_path: Path, backend: Tokenizer) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"New": 4}))
    read_special_tokens(tmp_path, {}, backend)
    (token,) = backend.get_added_tokens_decoder().values()
    assert (token.content, token.normalized, token.special) == ("New", True, False)


def test_an_end_that_two_files_name_is_one(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert read_eos_ids(tmp_path) == (9, 2, 7)
