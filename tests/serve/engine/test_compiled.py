"""Whatever is wrong with the folder of compiled programs, they are compiled, and the operator hears of it."""

from __future__ import annotations

import os
import pwd
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import structlog
from jax.experimental.compilation_cache import compilation_cache

from serve.door import Programs
from serve.engine.compiled import keep_compiled_programs
from serve.engine.programs import ProgramCount

READING = "a compiled program that was kept cannot be read, and is compiled anew"
WRITING = "what is compiled now is not kept"
NOT_KEPT = "compiled programs are not kept"
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = {option: getattr(jax.config, option) for option in OPTIONS}
    show = warnings.showwarning
    yield
    warnings.showwarning = show
    for option, value in before.items():
        jax.config.update(option, value)
    compilation_cache.reset_cache()


def start(folder: Path | str) -> list[str]:
    """Compile as a server that starts does, with its programs in `folder`; what is said about it."""
    compilation_cache.reset_cache()
    jax.clear_caches()
    with structlog.testing.capture_logs() as heard:
        keep_compiled_programs(str(folder))
        for size in (3, 4):

            @jax.jit
            def program(x: jax.Array) -> jax.Array:
                return x * 2 + size  # noqa: B023

            assert program(jnp.ones(5, jnp.int32)).tolist() == [2 + size] * 5
    assert all(each["error"] and "\n" not in each["error"] for each in heard)
    return [each["event"] for each in heard]


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*-cache")}


@contextmanager
def full_disk() -> Iterator[None]:
    """Files take some bytes, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_programs_are_kept_and_used_again_without_a_word(tmp_path: Path) -> None:
    assert start(tmp_path / "made") == []
    kept = entries(tmp_path / "made")
    assert len(kept) >= 2
    assert start(tmp_path / "made") == []
    assert entries(tmp_path / "made") == kept


@pytest.mark.parametrize(
    "broken",
    [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: os.urandom(len(data))],
    ids=["empty", "cut short", "random"],
)
def test_an_entry_that_cannot_be_read_is_told_of_and_written_anew(
    tmp_path: Path, broken: Callable[[bytes], bytes]
) -> None:
    start(tmp_path)
    names = entries(tmp_path).keys()
    for name in names:
        (tmp_path / name).write_bytes(broken((tmp_path / name).read_bytes()))
    assert start(tmp_path) == [READING], "once, however many there are"
    assert entries(tmp_path).keys() == names
    assert start(tmp_path) == []


def test_a_full_disk_is_told_of_and_what_it_leaves_behind_does_no_harm(tmp_path: Path) -> None:
    with full_disk():
        assert start(tmp_path) == [WRITING]
    assert start(tmp_path) in ([READING], [])
    assert start(tmp_path) == []


def test_what_was_kept_is_used_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path)
    kept = entries(tmp_path)

    def read_only(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    assert start(tmp_path) == [WRITING]
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert entries(tmp_path) == kept


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/cannot/be/made", "\0"])
def test_what_cannot_be_a_folder_is_told_of(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    assert start(tmp_path / folder) == [NOT_KEPT]
    assert jax.config.jax_compilation_cache_dir != str(tmp_path / folder)


def test_nobody_needs_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert start("~/.cache/taper") == [NOT_KEPT]


def test_other_warnings_are_as_they_were(tmp_path: Path) -> None:
    keep_compiled_programs(str(tmp_path))
    with pytest.raises(UserWarning, match="something else"):
        warnings.warn("something else", stacklevel=1)


def test_programs_that_were_compiled_and_found_are_counted_at_the_start_and_later(tmp_path: Path) -> None:
    first = ProgramCount()
    start(tmp_path)
    compiled, cached, *late = first.now()
    assert (compiled >= 2, cached, late) == (True, 0, [0, 0]), "with those that made the arguments"

    second = ProgramCount()
    start(tmp_path)
    assert second.now() == Programs(compiled=0, cached=compiled)
    second.serving()
    start(tmp_path)
    assert second.now() == Programs(compiled=0, cached=compiled, late_cached=compiled)
    start(tmp_path / "new")
    assert second.now() == Programs(0, compiled, late_compiled=compiled, late_cached=compiled)
