"""What a gateway needs to tokenize by itself."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from tokenizers import Tokenizer

from model.find import tokenizer_folder
from serve.server.gateway.tokenizer import archive


def test_the_archive_has_the_files_of_the_tokenizer_and_nothing_else() -> None:
    data = archive(tokenizer_folder("default"))
    assert data is not None
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        names = set(opened.namelist())
        assert names == {"tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"}
        assert Tokenizer.from_str(opened.read("tokenizer.json").decode()).encode("cat").ids
    assert archive(tokenizer_folder("default")) == data


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert archive(tmp_path) is None


def test_a_preset_has_the_one_that_its_server_uses() -> None:
    assert tokenizer_folder("qwen3-32b") == tokenizer_folder("default")
