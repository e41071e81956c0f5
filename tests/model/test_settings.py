"""Files of strangers are read key by key, and every fault is one short line."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.settings import MOST, CheckpointError, Settings, listed, read_object, read_optional, shown

NULL = Settings({"a": None, "size": 3, "flag": True, "ids": 7, "inner": {"size": "3"}}, "f.json")


def test_null_is_as_good_as_absent() -> None:
    assert "a" not in NULL
    assert NULL.size("a", 5) == 5
    assert NULL.ids("a") == ()
    assert NULL.text("a") is None
    assert not NULL.flag("a")
    assert NULL.faults == []


def test_values_are_taken_as_they_are_and_never_converted() -> None:
    settings = Settings({"size": 3, "number": 2, "one": 7, "many": [1, 2]}, "f.json")
    assert settings.size("size") == 3
    assert settings.number("number") == 2.0
    assert (settings.ids("one"), settings.ids("many")) == ((7,), (1, 2))
    assert settings.faults == []
    settings.size("number", least=3)
    settings.number("size", above=3.0)
    settings.flag("size")
    settings.text("size")
    assert settings.faults == [
        "f.json: number: expected a whole number from 3 to 2147483647, found 2",
        "f.json: size: expected a number greater than 3, found 3",
        "f.json: size: expected true or false, found 3",
        "f.json: size: expected a text of one line, found 3",
    ]


def test_bounds_are_within_what_is_taken_and_what_is_true_is_no_number() -> None:
    values = {
        "most": MOST,
        "more": MOST + 1,
        "true": True,
        "ids": [0, MOST],
        "wrong": [MOST + 1],
        "odd": [True],
    }
    settings = Settings(values, "f.json")
    assert (settings.size("most"), settings.ids("ids")) == (MOST, (0, MOST))
    assert settings.faults == []
    settings.size("more")
    settings.size("true")
    settings.number("true")
    assert (settings.ids("wrong"), settings.ids("odd")) == ((), ())
    assert len(settings.faults) == 5


def test_a_fault_of_an_inner_object_is_noted_outside_once() -> None:
    settings = Settings({"inner": {"size": "3"}}, "f.json")
    settings.section("inner").size("size")
    settings.section("inner").size("size")
    assert settings.faults == ["f.json: inner: size: expected a whole number from 1 to 2147483647, found '3'"]


def test_long_values_and_long_lists_are_cut() -> None:
    assert len(shown("x" * 1000)) < 70
    assert shown("x" * 58) == repr("x" * 58), "sixty characters are shown"
    assert shown("x" * 59) == "'" + "x" * 59 + "..."
    assert shown("a\nb") == r"'a\nb'"
    assert listed(["a", "b", "c"], 2) == "a; b; and 1 more"
    assert listed(["a", "b"], 2) == "a; b"


def test_a_file_is_an_object_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    assert read_optional(path) == {}
    with pytest.raises(CheckpointError, match=r"f\.json: expected a file, found nothing"):
        read_object(path)
    path.write_text('{"a": 1}')
    assert read_object(path) == read_optional(path) == {"a": 1}
