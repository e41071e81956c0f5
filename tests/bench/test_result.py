from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench.result import head, keep, ran_on, say, write


def test_a_head_says_what_ran_and_on_what() -> None:
    alone = head("python -m bench.x")
    assert alone.keys() == {"command", "time", "client"}
    assert {"host", "python", "grpcio", "protobuf", "numpy"} == alone["client"].keys()
    device = {"hardware": {"device": "a card"}, "versions": {}}
    assert head("python -m bench.x", device).keys() == {"command", "time", "hardware", "versions"}


def test_what_it_ran_on_is_a_line() -> None:
    alone = head("python -m bench.x")
    assert ran_on(alone).startswith(f"Ran on {alone['client']['host']} (python {alone['client']['python']}, ")
    device = {"hardware": {"device": "a card"}, "versions": {"python": "3", "jax": "0"}}
    assert ran_on(device | {"server": {"device": "another", "devices": 2}}) == (
        "Ran on a card (python 3, jax 0), against 2 x another."
    )


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "out.json"
    write({"a": math.nan, "b": [math.inf, np.float64("nan"), 1.5], "c": {"d": (-math.inf, "nan", 2)}}, out)
    assert json.loads(out.read_text()) == {"a": None, "b": [None, None, 1.5], "c": {"d": [None, "nan", 2]}}


def test_a_file_is_replaced_as_a_whole_and_a_device_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Path) -> None:
        raise OSError("no space")

    out = tmp_path / "out.json"
    write({"rows": 1}, out)
    with monkeypatch.context() as failing:
        failing.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="no space"):
            write({"rows": 2}, out)
        write({"rows": 2}, "/dev/null")
    assert json.loads(out.read_text()) == {"rows": 1}
    write({"rows": 2}, out)
    assert json.loads(out.read_text()) == {"rows": 2}
    assert [*tmp_path.iterdir()] == [out]


def test_standard_output_has_the_whole_result_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    keep({"rows": 1}, "-")
    say("a table", "-")
    write({"rows": 2}, "-")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"rows": 2}
    assert printed.err == "a table\n"
    say("a table", "out.json")
    assert capsys.readouterr().out == "a table\n"


def test_a_file_keeps_what_there_is_so_far(tmp_path: Path) -> None:
    keep({"rows": 1}, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == {"rows": 1}
    keep({"rows": 1}, None)
