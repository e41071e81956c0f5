from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attention.wrapped import Wrapped
from attention.xla import Xla
from bench import hardware
from bench.checks import greedy, model
from bench.checks.logits import ERROR_BAR
from bench.checks.model import main, passed
from bench.checks.scale import SCALES
from bench.device.step import WithoutAllReduces
from model.config import ModelConfig
from model.sharding import Placement

pytestmark = pytest.mark.usefixtures("quick_compiler")

TINY = SCALES["tiny"]


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "greedy_of_transformers", lambda *_: None)


@pytest.fixture
def without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is taper-decode asked in another process, as it is in test_greedy.py."""
    here = greedy.greedy_here
    monkeypatch.setattr(greedy, "greedy_on_cpu", lambda *arguments: here(*arguments, Xla()))


@pytest.mark.full
@pytest.mark.usefixtures("without_transformers", "without_a_process")
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


@pytest.mark.usefixtures("without_transformers", "without_a_process")
@pytest.mark.full
def test_a_model_that_attends_wrongly_fails_every_check() -> None:
    result = main(["--scale", "tiny"], Wrong(Xla()))
    assert not result["ok"]
    assert not result["greedy"][0]["cpu"]["ok"]
    assert not result["logits"]["ok"]
    assert result["logits"]["error"] > 2 * ERROR_BAR


@pytest.fixture
def compared_with_one_device(without_a_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what rows' bits depend on is not asked."""
    monkeypatch.setattr(model, "check_schedules", lambda *_: [])


@pytest.mark.usefixtures("without_transformers", "compared_with_one_device")
@pytest.mark.full
def test_a_model_over_two_devices_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scale", "tiny", "--tensor-parallel", "2"])["ok"]
    assert "Ran on 2 x cpu" in capsys.readouterr().out


@pytest.mark.usefixtures("without_transformers", "compared_with_one_device")
@pytest.mark.full
def test_devices_that_tell_each_other_nothing_fail_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(config: ModelConfig, devices: int, *, peer_memory: bool) -> Placement:
        placement = Placement.over(config, devices, peer_memory=peer_memory)
        return WithoutAllReduces(placement.mesh, placement.rules)

    monkeypatch.setattr(hardware, "placement", apart)
    result = main(["--scale", "tiny", "--tensor-parallel", "2"])
    assert not result["greedy"][0]["cpu"]["ok"]
    assert not result["logits"]["ok"]


def test_one_missed_bar_fails() -> None:
    good, bad = {"ok": True}, {"ok": False}
    assert passed({"greedy": [{"cpu": good, "transformers": None}], "logits": good})
    assert not passed({"greedy": [{"cpu": good, "transformers": bad}], "logits": good})
    assert not passed({"greedy": [{"cpu": good, "transformers": good}], "logits": bad})
