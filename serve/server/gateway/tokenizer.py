"""The files of a model folder that a gateway needs to tokenize by itself, in one archive."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from model.tokenizer_files import has_tokenizer

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file, so that equal files make equal archives


def archive(folder: Path) -> bytes | None:
    """A zip of those that there are; None if there is no tokenizer. Raises OSError."""
    if not has_tokenizer(folder):
        return None
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _FILES:
            if (folder / name).is_file():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), (folder / name).read_bytes())
    return written.getvalue()
