"""The file of tokens: what it says, what is no such file, and what becomes of it while the server runs."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from serve.server import tokens as module
from serve.server.tokens import Token, Tokens
from taper_client.errors import UnauthenticatedError
from tests.serve.server.token_files import entry

SECRET = "aGVsbG8gd29ybGQhIQ"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


@pytest.fixture(autouse=True)
def always_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)


def test_a_token_stands_there_itself_or_by_its_digest(file: Path) -> None:
    digest = hashlib.sha256(b"another-secret-of-ours").hexdigest().upper()
    file.write_text(entry(token=SECRET) + entry("b", '["control", "metrics"]', sha256=digest))
    tokens = Tokens(str(file))
    assert tokens.identify(f"Bearer {SECRET}") == Token("a", frozenset({"generate"}))
    assert tokens.identify("bearer  another-secret-of-ours ") == Token("b", frozenset({"control", "metrics"}))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "NO_TOKEN"),
        ("", "NO_TOKEN"),
        ("Bearer", "WRONG_TOKEN"),
        (f"Basic {SECRET}", "WRONG_TOKEN"),
        (SECRET, "WRONG_TOKEN"),
        (f"Bearer {SECRET[:-1]}", "WRONG_TOKEN"),
        (f"Bearer {SECRET}, Bearer {SECRET}", "WRONG_TOKEN"),
        (f"Bearer {SECRET.lower()}", "WRONG_TOKEN"),
        (f"Bearer {hashlib.sha256(SECRET.encode()).hexdigest()}", "WRONG_TOKEN"),
        ("Bearer \udcff", "WRONG_TOKEN"),
    ],
)
def test_what_is_no_token_is_told_so_and_not_repeated(file: Path, header: str | None, reason: str) -> None:
    file.write_text(entry(token=SECRET))
    with pytest.raises(UnauthenticatedError) as caught:
        Tokens(str(file)).identify(header)
    assert caught.value.reason == reason
    assert SECRET[:-1] not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "[[token]] tables"),
        ("token = 3", "[[token]] tables"),
        ("token = []", "[[token]] tables"),
        (entry(token=SECRET) + "[other]", "[[token]] tables"),
        ('tokens = "x"\n' + entry(token=SECRET), "[[token]] tables"),
        ("[[token]", "line 1"),
        ("token = [3]", "token 1: it has a tenant"),
        (entry(token=SECRET, colour="red"), "token 1: it has a tenant"),
        (entry("", token=SECRET), "tenant is"),
        (entry("a/b", token=SECRET), "tenant is"),
        (entry("a" * 65, token=SECRET), "tenant is"),
        (entry(roles='"generate"', token=SECRET), "roles are some of control, generate, metrics"),
        (entry(roles="[]", token=SECRET), "roles are"),
        (entry(roles='["generate", "root"]', token=SECRET), "roles are"),
        (entry(roles='["generate", ["control"]]', token=SECRET), "roles are"),
        (entry(), "one of token and sha256"),
        (entry(token=SECRET, sha256="0" * 64), "one of token and sha256"),
        (entry(token="short"), "at least 16 characters"),
        (entry(token=SECRET + " x"), "at least 16 characters"),
        (entry(token=SECRET + "ä"), "at least 16 characters"),
        (entry(sha256=SECRET), "64 hexadecimal digits"),
        (entry(token=SECRET) + entry("b", token=SECRET), "token 2 is there twice"),
    ],
)
def test_what_is_no_such_file_is_said_with_its_flag_and_without_the_token(
    file: Path, text: str, problem: str
) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=r"^--tokens: ") as caught:
        Tokens(str(file))
    assert problem in str(caught.value)
    assert str(file) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_bytes_that_are_no_text_and_files_that_are_none_are_said_too(file: Path) -> None:
    file.write_bytes(b"\xff" + entry(token=SECRET).encode())
    for path in (file, file.parent, file.parent / "absent"):
        with pytest.raises(ValueError, match=f"^--tokens: .*{path.name}"):
            Tokens(str(path))


def test_a_file_that_changes_is_read_again(file: Path) -> None:
    file.write_text(entry(token=SECRET))
    tokens = Tokens(str(file))
    file.write_text(entry("b", token="another-secret-of-ours") + entry("c", token="and-one-more-of-these"))
    assert tokens.identify("Bearer another-secret-of-ours").tenant == "b"
    with pytest.raises(UnauthenticatedError):
        tokens.identify(f"Bearer {SECRET}")


def test_a_file_of_the_same_size_and_time_in_its_place_is_seen(file: Path) -> None:
    file.write_text(entry("a", token=SECRET))
    tokens, before = Tokens(str(file)), file.stat()
    other = file.with_name("other")
    other.write_text(entry("b", token=SECRET))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert tokens.identify(f"Bearer {SECRET}").tenant == "b"


def test_a_file_that_cannot_be_read_leaves_the_tokens_of_before_until_it_can(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(entry(token=SECRET))
    tokens = Tokens(str(file))
    for break_it in (lambda: file.write_text("[[token]"), file.unlink):
        break_it()
        assert [tokens.identify(f"Bearer {SECRET}").tenant for _ in range(3)] == ["a"] * 3
        assert capsys.readouterr().out.count("still count") == 1
    file.write_text(entry("b", token=SECRET))
    assert tokens.identify(f"Bearer {SECRET}").tenant == "b"


def test_nobody_waits_for_a_pipe_in_its_place(file: Path) -> None:
    file.write_text(entry(token=SECRET))
    tokens = Tokens(str(file))
    file.unlink()
    os.mkfifo(file)
    asked = threading.Thread(target=tokens.identify, args=[f"Bearer {SECRET}"], daemon=True)
    asked.start()
    asked.join(10.0)
    assert not asked.is_alive()


def test_a_file_that_is_nested_too_deeply_leaves_the_tokens_of_before(file: Path) -> None:
    file.write_text(entry(token=SECRET))
    tokens = Tokens(str(file))
    file.write_text(f"token = {'[' * 5000}")
    assert tokens.identify(f"Bearer {SECRET}").tenant == "a"
