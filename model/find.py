"""Which model a name means: its folder, its config and its tokenizer. Nothing here needs JAX."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from model.config import PRESETS, ModelConfig
from model.hf_config import read_folder
from model.tokenizer import Tokenizer

_EMBEDDED = Path(__file__).parent / "tiny"


def model_folder(name: str) -> Path | None:
    """The folder of a model: None for a preset, the embedded model's for "default", else the path itself.

    Raises FileNotFoundError, saying what would be accepted, if there is no such folder.
    """
    if name in PRESETS:
        return None
    folder = _EMBEDDED if name == "default" else Path(name)
    if not name or not folder.is_dir():
        presets = ", ".join(PRESETS)
        raise FileNotFoundError(
            f'no model {name!r}: give a folder with a config.json, "default", or one of {presets}'
        )
    return folder


def tokenizer_folder(name: str) -> Path:
    """Where a model's tokenizer is read from. A preset has none of its own: the embedded one will do for its
    random weights."""
    return model_folder(name) or _EMBEDDED


def model_config(name: str) -> ModelConfig:
    """The config of a folder, a preset or "default"."""
    folder = model_folder(name)
    return PRESETS[name] if folder is None else read_folder(folder)


def model_tokenizer(name: str) -> tuple[Tokenizer, Collection[int] | None]:
    """The tokenizer for a model, and the ids that may be sampled: those that stand for something; None: any,
    where the tokenizer is not the model's own.
    """
    tokenizer = Tokenizer.from_folder(tokenizer_folder(name))
    own = model_folder(name) is not None and tokenizer.supports_text
    return tokenizer, tokenizer.spelling.pieces.keys() if own else None
