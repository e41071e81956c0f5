"""Overload and hostile clients, over a device that is none: small loads, and their figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.host import overload, strangers
from bench.host.attackers import KINDS


@pytest.mark.full
def test_more_than_a_server_can_serve_is_refused_in_time(tmp_path: Path) -> None:
    target = tmp_path / "overload.json"
    asked = ["--factors", "1,4", "--seconds", "1.5", "--rows", "4", "--tokens", "8", "--crowd", "24"]
    overload.main([*asked, "--json", str(target)])
    found = json.loads(target.read_text())
    usual, too_much = found["rows"]
    assert too_much["refused"] > usual["refused"]
    assert too_much["refused"] > 0.5
    assert too_much["in_time"] > 0.8, "beside other work; alone, all are"
    assert too_much["goodput"] > 0.5 * usual["goodput"] > 0
    assert 0 < too_much["refusal_p50_ms"] < 500
    assert found["wait"]["named_s"] > 0
    assert found["wait"]["waited_s"] > 0


@pytest.mark.full
def test_ordinary_clients_are_measured_beside_a_hostile_one(tmp_path: Path) -> None:
    target = tmp_path / "strangers.json"
    asked = ["--kinds", "tight", "--clients", "2", "--seconds", "1", "--tokens", "4"]
    strangers.main([*asked, "--json", str(target)])
    found = json.loads(target.read_text())
    assert [row["attacker"] for row in found["rows"]] == ["nobody", "tight", "nobody"]
    for row in found["rows"]:
        assert row["answers"] > 0
        assert row["failed"] == 0
        assert row["gap_p50_ms"] > 15, "a step of the device"
        assert row["ttft_p99_ratio"] > 0


def test_ratios_are_to_the_mean_of_those_without_an_attacker() -> None:
    rows = [
        {"attacker": name, "ttft_p99_ms": ttft, "gap_p99_ms": 10.0}
        for name, ttft in (("nobody", 20.0), ("flood", 60.0), ("nobody", 40.0))
    ]
    ratios = [row["ttft_p99_ratio"] for row in strangers.compared(rows)]
    assert ratios == pytest.approx([2 / 3, 2.0, 4 / 3])


def test_there_is_an_attacker_of_each_kind_that_the_page_names() -> None:
    assert [*KINDS] == ["tight", "flood", "cancels", "deaf", "watch", "tags", "large", "texts"]
