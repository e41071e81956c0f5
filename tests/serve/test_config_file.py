"""A file of options says what flags say, and what is wrong with it is told in a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from serve.config import GROUPS, ServerConfig, flag
from serve.config.command_line import configured
from serve.config.file import ConfigFileError, read

HINTS = get_type_hints(ServerConfig)
OPTIONS = [option.name for option in fields(ServerConfig)]
CHOSEN = {"policy": "cap:3"}  # where not just any value can be


def kinds(hint: Any) -> Iterator[Any]:
    inner = get_args(hint)
    if get_origin(hint) in (Literal, tuple, None):
        yield hint
    else:
        yield from inner


def sample(option: str) -> Any:
    """A value other than the default."""
    default, kind = getattr(ServerConfig(), option), next(kinds(HINTS[option]))
    if option in CHOSEN:
        return CHOSEN[option]
    if get_origin(kind) is Literal:
        return next(value for value in get_args(kind) if value != default)
    if get_origin(kind) is tuple:
        return (3, 5)
    return {bool: not default, int: 3, float: 0.5, str: 'a "text", with\\'}[kind]


def as_toml(value: Any) -> str:
    return json.dumps("None" if value is None else value)


def as_arguments(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(option) if value else flag(f"no_{option}")]
    return [flag(option), *map(str, value if isinstance(value, tuple) else [value])]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.toml"


def test_a_file_of_all_options_is_the_same_as_all_flags(file: Path) -> None:
    samples = {option: sample(option) for option in OPTIONS}
    file.write_text("\n".join(f"{flag(name)[2:]} = {as_toml(value)}" for name, value in samples.items()))
    typed = [word for name, value in samples.items() for word in as_arguments(name, value)]
    assert configured(["--config", str(file)]) == configured(typed) == ServerConfig(**samples)
    assert [name for name in OPTIONS if samples[name] == getattr(ServerConfig(), name)] == []


def test_a_file_and_flags_can_say_that_there_is_none(file: Path) -> None:
    nones = {option: None for option in OPTIONS if NoneType in kinds(HINTS[option])}
    file.write_text("\n".join(f"{name} = {as_toml(None)}" for name in nones))
    typed = [word for name in nones for word in as_arguments(name, None)]
    assert configured(["--config", str(file)]) == configured(typed) == ServerConfig(**nones)
    assert ServerConfig(**nones).compilation_cache is None


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_stands_by_its_flag_or_its_field_alone_or_in_its_group(option: str, file: Path) -> None:
    group = next(name for name, group in GROUPS.items() if option in {each.name for each in fields(group)})
    value = sample(option)
    for before, key in (("", option), ("", flag(option)[2:]), (f"[{group}]\n", flag(option)[2:])):
        file.write_text(f"{before}{key} = {as_toml(value)}")
        assert read(file) == {option: value}


def test_what_is_typed_counts_before_what_is_in_the_file(file: Path) -> None:
    file.write_text(
        'port = 1\npolicy = "eager"\nbuckets = [4, 8]\nfill = false\ncompilation-cache = "None"\n'
    )
    typed = ["--port", "2", "--buckets", "16", "--fill"]
    wanted = ServerConfig(port=2, policy="eager", buckets=(16,), fill=True, compilation_cache=None)
    assert configured([*typed, "--config", str(file)]) == wanted
    assert configured([f"--config={file}", *typed]) == wanted
    assert configured(["--config", str(file), "--buckets", "None"]).buckets is None


def test_a_whole_number_is_a_number_too(file: Path) -> None:
    file.write_text("rho = 1\nrepay = inf\ntpot-slo-ms = 1" + 400 * "0")
    taken = read(file)
    assert taken == {"rho": 1.0, "repay": float("inf"), "tpot_slo_ms": float("inf")}
    assert isinstance(taken["rho"], float)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prot = 1", 'unknown option "prot" (is it port?)'),
        ("max-quue = 1", 'unknown option "max-quue" (is it max-queue?)'),
        ("zzz = 1", 'unknown option "zzz"'),
        ('"a\\nb" = 1', 'unknown option "a\\nb"'),
        ("[memry]\nbuckets = [1]", 'unknown table "memry" (is it memory?)'),
        ("[memory]\nport = 1", "--port belongs in [listening], not in [memory]"),
        ("listening = 1", "listening is a table of options, [listening], not 1"),
        ('config = "other.toml"', "--config cannot be given in a file"),
        ("version = true", 'unknown option "version"'),
        ("max-queue = 1\nmax_queue = 2", "--max-queue is given twice"),
        ("port = 1\n[listening]\nport = 2", "--port is given twice"),
        ('port = "1"', '--port must be a whole number, not "1"'),
        ("port = 1.5", "--port must be a whole number, not 1.5"),
        ("port = true", "--port must be a whole number, not true"),
        ("metrics-port = false", '--metrics-port must be a whole number or "None", not false'),
        ("rho = true", "--rho must be a number, not true"),
        ("fill = 1", "--fill must be true or false, not 1"),
        ('fill = "None"', '--fill must be true or false, not "None"'),
        ("model = 8", "--model must be a text, not 8"),
        ('[[model]]\nmodel = "x"', '--model must be a text, not [{"model": "x"}]'),
        ("policy = 2020-01-01", '--policy must be a text, not "2020-01-01"'),
        ('dtype = "int8"', '--dtype must be one of "bfloat16", "float32", "float64" or "None", not "int8"'),
        ("load-format = []", '--load-format must be one of "auto", "random", not []'),
        ("buckets = 8", '--buckets must be a list, each item a whole number or "None", not 8'),
        (
            "buckets = [8, true]",
            '--buckets must be a list, each item a whole number or "None", not [8, true]',
        ),
        ("[port]\nx = 1", '--port must be a whole number, not {"x": 1}'),
        ("prot = 1\nfill = 1", 'unknown option "prot" (is it port?); --fill must be true or false, not 1'),
    ],
)
def test_what_cannot_be_an_option_is_told_with_the_file(text: str, fault: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ConfigFileError) as caught:
        read(file)
    assert str(caught.value) == f"{file}: {fault}"


def test_a_long_value_is_not_told_in_full(file: Path) -> None:
    file.write_text(f'port = "{1000 * "x"}"')
    with pytest.raises(ConfigFileError, match=r"x{50}[.]{3}$"):
        read(file)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\nport 1\n", "is not TOML: .*line 2"),
        (b"port = 1\nport = 2", "is not TOML: "),
        (b"port = 1" + 5000 * b"0", "is not TOML: "),
        (b"buckets = " + 5000 * b"[", "is not TOML: "),
        (b"port = \xff", "is not UTF-8, at byte 7"),
    ],
)
def test_what_is_not_toml_is_told(content: bytes, fault: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigFileError, match=f"^--config: .*server[.]toml {fault}") as caught:
        read(file)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, file: Path) -> None:
    for path, why in ((file, "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigFileError, match=f"^--config: cannot read {path}: {why}"):
            read(path)


def test_a_file_may_begin_with_a_byte_order_mark_and_hold_nothing(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfport = 7")
    assert read(file) == {"port": 7}
    file.write_bytes(b"")
    assert configured(["--config", str(file)]) == ServerConfig()


def test_the_file_of_the_documentation_is_one(file: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    (example,) = re.findall("^```toml\n(.+?)^```", page, re.MULTILINE | re.DOTALL)
    file.write_text(example)
    config = configured(["--config", str(file)])
    assert (config.tpot_slo_ms, config.buckets, config.compilation_cache) == (60.0, (8, 16, 32, 64), None)
