"""What the machine keeps a thread waiting for is counted, where it can be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve.engine.pauses import Pauses


def test_what_is_taken_is_what_was_added_since_it_was_last_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "schedstat"
    monkeypatch.setattr(Pauses, "SOURCE", source)
    source.write_text("5000 2000000000 7\n")
    pauses = Pauses()
    assert pauses.take() == 0.0
    source.write_text("5000 2250000000 8\n")
    assert pauses.take() == 0.25
    assert pauses.take() == 0.0
    pauses.close()
    assert pauses.take() == 0.0


@pytest.mark.parametrize("content", [None, "", "12\n"])
def test_where_the_machine_does_not_count_them_there_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    monkeypatch.setattr(Pauses, "SOURCE", tmp_path / "schedstat")
    if content is not None:
        Pauses.SOURCE.write_text(content)
    pauses = Pauses()
    assert pauses.take() == pauses.take() == 0.0
    pauses.close()


def test_a_thread_gives_its_file_back() -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    pauses = Pauses()
    assert pauses.take() >= 0.0
    pauses.close()
    pauses.close()
    assert not before or len(os.listdir("/proc/self/fd")) == before
