"""The pages that are made from the code say of everything what it is, or are not made."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from docs.make import client, files, wire
from docs.make.pages import ROOT, filled
from docs.make.request import Life
from taper_client import names

PROTOS = ROOT / "serve/client/protos"
PACKAGE = ROOT / "serve/client/taper_client"


def test_every_exported_name_has_a_section() -> None:
    page = client.page(PACKAGE)
    assert [name for name in names.__all__ if name != "VERSION" and f"### {name}\n" not in page] == []


def test_a_name_without_a_docstring_has_no_page(tmp_path: Path) -> None:
    package = shutil.copytree(PACKAGE, tmp_path / "taper_client", ignore=shutil.ignore_patterns("v1"))
    text = (package / "plan.py").read_text()
    docstring = ast.get_docstring(next(n for n in ast.parse(text).body if getattr(n, "name", "") == "serial"))
    assert docstring is not None
    (package / "plan.py").write_text(text.replace(f'"""{docstring}"""', ""))
    with pytest.raises(ValueError, match="serial has no docstring"):
        client.page(package)


def test_a_field_without_a_comment_has_no_page(tmp_path: Path) -> None:
    protos = shutil.copytree(PROTOS, tmp_path / "protos")
    file = protos / "taper/v1/inference_service.proto"
    text = file.read_text()
    assert "  // Each less than the vocabulary size.\n" in text
    file.write_text(text.replace("  // Each less than the vocabulary size.\n", ""))
    with pytest.raises(KeyError):
        wire.page(wire.described(protos))


def test_a_file_without_a_docstring_has_no_place_in_the_index(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/bare.py").write_text("SIZE = 3\n")
    with pytest.raises(ValueError, match=r"bare\.py has no docstring"):
        files.page(tmp_path)


def test_a_part_is_filled_in_between_its_marks_alone() -> None:
    marks = "a\n<!-- made: part -->\nold\n<!-- end -->\nb\n"
    assert filled(marks, {"part": "new"}) == marks.replace("old", "new")
    with pytest.raises(ValueError, match="part"):
        filled("nothing", {"part": "new"})


def test_the_request_that_is_followed_shows_what_its_page_explains() -> None:
    """Branches that are held back, a token that is not known yet, a join, and an answer that is in time."""
    life = Life()
    entries = [entry for ran in life.steps for entry in ran.scheduled.step.entries]
    assert any(entry.tokens is None for entry in entries)
    assert [len(ran.scheduled.forecast.deferred) for ran in life.steps[2:6]] == [1, 1, 1, 1]
    assert max(len(entry.context) for entry in entries) == 4, "the prompt and three branches"
    assert f"{life.answer}" == "\nTea: hot\nCola: no\nWater: ice\nSo: tea"
    assert life.answer.timing.tpot_slo_met
