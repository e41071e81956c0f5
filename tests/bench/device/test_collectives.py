from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.device import collectives
from model.sampling import USES_RANDOM, USES_TOP

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "ROWS", (8,))
    monkeypatch.setattr(collectives, "CHAIN", 2)
    monkeypatch.setattr(collectives, "SAMPLER_CHAIN", 2)
    monkeypatch.setattr(collectives, "SAMPLERS", (0, USES_RANDOM | USES_TOP))


def test_what_two_devices_tell_each_other_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = collectives.main(["--scale", "tiny", "--tensor-parallel", "2", "--json", str(out)])
    assert json.loads(out.read_text()) == result
    assert result["all_reduce_us"]["8"] > 0
    assert result["quick_sum_us"]["8"] > 0
    assert result["all_gather_us"]["8"] > 0
    assert result["sampler_us"].keys() == {"0", "3"}
    assert all(took > 0 for took in result["sampler_us"].values())


def test_one_device_has_its_samplers_to_compare_with(capsys: pytest.CaptureFixture[str]) -> None:
    result = collectives.main(["--scale", "tiny"])
    assert not result["all_reduce_us"]
    assert result["sampler_us"].keys() == {"0", "3"}
    assert "sampler" in capsys.readouterr().out
