from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attention.wrapped import Wrapped
from attention.xla import Xla
from bench.checks import greedy
from bench.checks.logits import ERROR_BAR
from bench.checks.model import main, passed
from bench.checks.scale import SCALES

pytestmark = pytest.mark.usefixtures("quick_compiler")

TINY = SCALES["tiny"]


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "greedy_of_transformers", lambda *_: None)


@pytest.mark.usefixtures("without_transformers")
def test_a_right_model_passes_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "check.json"
    result = main(["--scale", "tiny", "--json", str(out)])
    assert json.loads(out.read_text()) == result
    assert result["ok"]
    tokens = len(TINY.prompts) * TINY.branches * TINY.new_tokens
    assert result["greedy"][0]["cpu"] == {"same": tokens, "tokens": tokens, "ok": True}
    assert result["logits"]["positions"] == TINY.requests * (TINY.trunk + TINY.width * TINY.tail)
    again, *others = result["schedules"]
    assert again["bit_equal_rows"] == 1
    assert all(row["largest_difference"] < 0.2 and row["same_top_token"] > 0.9 for row in others)
    assert "transformers  not installed" in capsys.readouterr().out


class Wrong(Wrapped):
    __slots__ = ()

    def attend(self, q: Any, pages: Any, work: Any, *, scale: float) -> tuple[Any, Any]:
        return self.inner.attend(q, pages, work, scale=0.7 * scale)


@pytest.mark.usefixtures("without_transformers")
def test_a_model_that_attends_wrongly_fails_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    here = greedy.greedy_here
    monkeypatch.setattr(greedy, "greedy_on_cpu", lambda *arguments: here(*arguments, Xla()))
    result = main(["--scale", "tiny"], Wrong(Xla()))
    assert not result["ok"]
    assert not result["greedy"][0]["cpu"]["ok"]
    assert not result["logits"]["ok"]
    assert result["logits"]["error"] > 2 * ERROR_BAR


def test_one_missed_bar_fails() -> None:
    good, bad = {"ok": True}, {"ok": False}
    assert passed({"greedy": [{"cpu": good, "transformers": None}], "logits": good})
    assert not passed({"greedy": [{"cpu": good, "transformers": bad}], "logits": good})
    assert not passed({"greedy": [{"cpu": good, "transformers": good}], "logits": bad})
