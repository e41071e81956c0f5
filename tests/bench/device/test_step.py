from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bench import hardware
from bench.device import step
from bench.device.step import StepBench, main

pytestmark = pytest.mark.usefixtures("quick_compiler")

CASES = ((8, 8, 2048, 192), (32, 4, 2048, 192))


@pytest.fixture(autouse=True)
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CASES", CASES)
    monkeypatch.setattr(hardware, "copy_tb_s", lambda **_: 0.01)


def test_a_tiny_step_is_compared_with_itself_without_attention(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    result = main(["--backend", "xla", "--scale", "tiny", "--json", str(out)])
    assert json.loads(out.read_text()) == result
    assert len(result["cases"]) == len(CASES)
    for case in result["cases"]:
        assert case["limit_ms"] == pytest.approx(case["without_attention_ms"] + 1.25 * case["kv_floor_ms"])
        assert "all_reduces_ms" not in case
    assert {row["program"] for row in result["memory"]} == {"step", "without_attention"}


class Kept(StepBench):
    """Counts the all-reduces of each variant's program."""

    counts: ClassVar[dict[str, int]] = {}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for (_, variant), program in self.programs.items():
            self.counts[variant] = program.forward.as_text().count(" all-reduce(")


def test_a_tiny_step_of_two_devices_is_divided_into_its_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "StepBench", Kept)
    result = main(["--backend", "xla", "--scale", "tiny", "--tensor-parallel", "2"])
    assert result["hardware"]["devices"] == 2
    for case in result["cases"]:
        assert case["all_reduces_ms"] == pytest.approx(case["step_ms"] - case["without_all_reduces_ms"])
        parts = [case[f"{part}_ms"] for part in ("products", "attention", "all_reduces")]
        assert sum(parts) == pytest.approx(case["step_ms"])
    assert "all-reduces" in capsys.readouterr().out
    # Two a layer; the embedding's stays.
    whole = 2 * result["layers"] + 1
    assert Kept.counts == {"step": whole, "without_attention": whole, "without_all_reduces": 1}
