"""What the files of a model folder say about its tokenizer: the backend, special tokens, chat template, ends.

Everything is looked for where transformers 5 looks for it, and what wins where two files disagree is what
wins there; docs/checkpoints.md has the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from model.settings import (
    CheckpointError,
    Settings,
    listed,
    one_line,
    present,
    read_optional,
    read_text,
    shown,
)

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class TokenizerError(CheckpointError):
    """A model folder's tokenizer or chat template is unreadable, or its files contradict each other."""


def has_tokenizer(folder: Path) -> bool:
    return present(folder / TOKENIZER)


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of `tokenizer.json`."""
    path = folder / TOKENIZER
    text = read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises bare Exception, and panics, which are not even that
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise TokenizerError(f"cannot read {path}: {one_line(error)}") from error
    backend.no_truncation()  # a file may ask for both; a prompt is never silently cut or padded
    backend.no_padding()
    return backend


# --- special tokens ----------------------------------------------------------------------------------------


def read_special_tokens(
    folder: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> dict[str, str]:
    """The tokens that have a name, such as {"bos_token": "<s>"}; what is special becomes so in `backend`.

    `special_tokens_map.json` and `added_tokens.json` are older than `added_tokens_decoder` in `config`, and
    count only without it; the former then wins over `config`. A token that no file gives an id is none.
    """
    path, sources = folder / CONFIG, [(config, folder / CONFIG)]
    if "added_tokens_decoder" in config:
        _add(backend, _decoder_tokens(config["added_tokens_decoder"], path), path)
    else:
        older, path = folder / "special_tokens_map.json", folder / "added_tokens.json"
        sources.append((read_optional(older), older))
        _add(backend, _listed_tokens(read_optional(path), path), path)
    named = dict(pair for source in sources for pair in _named(*source))
    added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    special = [token for token in named.values() if not added.get(token)]
    special += [token for source in sources for token in _unnamed(*source) if token not in added]
    known = (token for token in dict.fromkeys(special) if backend.token_to_id(token) is not None)
    backend.add_special_tokens(list(known))
    return named


def _content(value: Any, path: Path, key: str) -> str:
    """A token is written as a string or as {"content": string}."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise TokenizerError(f"{path}: {key}: expected a token, found {shown(value)}")
    return content


def _named(values: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if key in _NAMED and value is not None:
            yield key, _content(value, path, key)
        elif key.endswith("_token") and isinstance(value, str):
            yield key, value
    extra = values.get("extra_special_tokens")
    if isinstance(extra, dict):  # a model's own names
        for key, value in extra.items():
            yield key, _content(value, path, f"extra_special_tokens: {shown(key)}")


def _unnamed(values: Mapping[str, Any], path: Path) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = values.get(key) or []
        if isinstance(value, dict) and key == "extra_special_tokens":
            continue
        if not isinstance(value, list):
            raise TokenizerError(f"{path}: {key}: expected a list of tokens, found {shown(value)}")
        for token in value:
            yield _content(token, path, key)


def _decoder_tokens(value: Any, path: Path) -> Iterator[tuple[int, AddedToken]]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder: expected an object, found {shown(value)}")
    for key, token in value.items():
        if not (key.isascii() and key.isdigit()) or not isinstance(token, dict):
            raise TokenizerError(
                f"{path}: added_tokens_decoder: expected ids and tokens, found {shown(key)}: {shown(token)}"
            )
        flags = {
            name: bool(token[name])
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if name in token
        }
        yield int(key), AddedToken(_content(token, path, f"added_tokens_decoder: {key}"), **flags)


def _listed_tokens(values: Mapping[str, Any], path: Path) -> Iterator[tuple[int, AddedToken]]:
    for content, token in values.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise TokenizerError(f"{path}: {shown(content)}: expected a token id, found {shown(token)}")
        yield token, AddedToken(content, normalized=True)


def _add(backend: tokenizers.Tokenizer, tokens: Iterable[tuple[int, AddedToken]], path: Path) -> None:
    """Adds what the backend does not know yet, and makes special what is; ids have to agree."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for wanted, token in sorted(tokens, key=lambda pair: pair[0]):
        known = backend.token_to_id(token.content)
        if known is None or (token.special and token.content not in special):
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        found = backend.token_to_id(token.content)
        if found != wanted:
            name = shown(token.content)
            raise TokenizerError(
                f"{path} and {TOKENIZER} disagree about {name}: expected id {wanted}, found {found}"
            )


# --- chat template -----------------------------------------------------------------------------------------


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, Path] | None:
    """The source of the default chat template, and the file that it is from.

    Template files win over tokenizer_config.json, all together; chat_template.json, which processors once
    wrote, counts last.
    """
    default = folder / "chat_template.jinja"
    files = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    files |= {"default": default} if present(default) else {}
    if files:
        path = files.get("default")
        return path and (read_text(path), path)
    legacy = folder / "chat_template.json"
    for path, values in ((folder / CONFIG, config), (legacy, read_optional(legacy))):
        if values.get("chat_template") is not None:
            source = _default(values["chat_template"], path)
            return None if source is None else (source, path)
    return None


def _default(value: Any, path: Path) -> str | None:
    """Of a template, named templates or a list of them: the one that is meant where none is named."""
    if isinstance(value, list):
        entries = [
            entry for entry in value if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        ]
        if len(entries) < len(value):
            raise TokenizerError(f"{path}: chat_template: expected names and templates, found {shown(value)}")
        value = {str(entry["name"]): entry["template"] for entry in entries}
    if isinstance(value, dict):
        value = value.get("default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{path}: chat_template: expected a text, found {shown(value)}")
    return value


# --- the end of a text -------------------------------------------------------------------------------------


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text, by generation_config.json and config.json."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        settings = Settings(read_optional(folder / name), str(folder / name))
        ids += settings.ids("eos_token_id")
        if settings.faults:
            raise TokenizerError(listed(settings.faults))
    return tuple(dict.fromkeys(ids))
