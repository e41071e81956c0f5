"""Special tokens and chat templates, as transformers finds them in the same folder. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.tokenizer import Tokenizer
from tests.model.folders import Folder

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # torch and transformers warn as they like
]

QUESTION = [{"role": "user", "content": "Why?"}]
TEXT = "a<|im_start|><Path>b<new><|endoftext|>"


def _config(*without: str, **changes: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.edit("tokenizer_config.json", *without, **changes)


def _both(*changes: Callable[[Folder], None]) -> Callable[[Folder], None]:
    return lambda folder: [change(folder) for change in changes] and None


def _file(name: str, content: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.write(name, content)


NEW = {"269": {"content": "<new>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}}
OLDER = _file("special_tokens_map.json", {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<Path>"})
FOLDERS: dict[str, Callable[[Folder], None]] = {
    "as it is": lambda folder: None,
    "older file": OLDER,
    "older file beside added tokens": _both(OLDER, _config(added_tokens_decoder={})),
    "added tokens": _config(added_tokens_decoder=NEW),
    "added list": _file("added_tokens.json", {"<new>": 269}),
    "more special tokens": _config(additional_special_tokens=["<Path>"]),
    "extra special tokens": _config(extra_special_tokens=["<Path>"]),
    "special token of the vocabulary": _config(additional_special_tokens=["b"]),
    "template in config": _both(
        lambda folder: folder.remove("chat_template.jinja"), _config(chat_template="{{ eos_token }}!")
    ),
    "file over config": _config(chat_template="{{ eos_token }}!"),
    "named files": _both(
        _file("additional_chat_templates/rag.jinja", "rag"), _config(chat_template="not this one")
    ),
    "named in config": _both(
        lambda folder: folder.remove("chat_template.jinja"),
        _config(chat_template=[{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]),
    ),
    "a beginning that is asked for": _config(add_bos_token=True, bos_token="<|im_start|>"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_tokenizer_is_the_one_that_transformers_finds(name: str, tmp_path: Path) -> None:
    import transformers

    folder = Folder.make(tmp_path / "model")
    FOLDERS[name](folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder.path)
    mine = Tokenizer.from_folder(folder.path)
    named = {key: str(token) for key, token in theirs.special_tokens_map.items()}
    assert mine.special_tokens is not None
    assert {key: mine.special_tokens.get(key) for key in named} == named
    ids = theirs.encode(TEXT)
    assert mine.encode(TEXT, add_special_tokens=True) == ids
    for skip in (False, True):
        assert mine.decode(ids, skip) == theirs.decode(ids, skip, clean_up_tokenization_spaces=False)
    rendered = theirs.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert mine.render_chat(QUESTION) == rendered
