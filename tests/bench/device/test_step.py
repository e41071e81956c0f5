from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import hardware
from bench.device import step
from bench.device.step import main

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
    assert {row["backend"] for row in result["memory"]} == {"xla", "without attention"}
