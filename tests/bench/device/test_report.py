from __future__ import annotations

from typing import Any

import pytest

from bench.device.report import best_peer, speedup, summary, table


def case(**changes: Any) -> dict[str, Any]:
    shape = {
        "suite": "shared",
        "groups": 4,
        "width": 8,
        "prefix": 4096,
        "tail": 256,
        "ragged": None,
        "page": 64,
    }
    times = {"ours_us": 50.0, "floor_us": 40.0, "arithmetic_us": 10.0, "unique_bytes": 2e8}
    peers = {"flashinfer_flat_us": 90.0, "flashinfer_composed_fa2_us": 70.0}
    return shape | {"q_heads": 64, "kv_heads": 8} | times | peers | changes


def result(*cases: dict[str, Any]) -> dict[str, Any]:
    head = {"hardware": {"device": "card"}, "versions": {"jax": "0"}, "backend": "gpu", "seed": 1}
    return head | {"copy_tb_s": 4.0, "matmul_tflop_s": 800.0, "cases": list(cases)}


def test_the_best_peer_is_the_fastest_measured() -> None:
    assert best_peer(case()) == ("composed_fa2", 70)
    assert speedup(case()) == pytest.approx(1.4)
    assert best_peer({"ours_us": 1}) is None


def test_the_summary_states_the_aims() -> None:
    text = summary(result(case(), case(ours_us=80.0, width=16), case(suite="prefill")))
    assert "shared: 1.11 x the best peer (geometric mean), lowest 0.88" in text
    assert "at least level (5 % noise) on 1 of 2" in text
    assert "0..64 query lanes: up to 1.25 x the floor (aim 1.2), 0 of 1" in text
    assert "65..128 query lanes: up to 2.00 x the floor (aim 1.5), 0 of 1" in text
    assert "20% of the matmul rate, composed_fa2 14%" in text


def test_the_table_has_a_line_for_every_case_measured_or_not() -> None:
    failed = {key: value for key, value in case().items() if key != "ours_us"} | {"error": "out of memory"}
    header, measured, unmeasured = table([case(), failed]).splitlines()
    assert header.split()[-1] == "speedup"
    assert measured.split()[-1] == "1.40"
    assert "out of memory" in unmeasured


def test_who_just_meets_an_aim_meets_it() -> None:
    """1.2 times the floor is within the aim; 5 % behind the best peer is level; 100 MB are large."""
    near = case(ours_us=60.0, floor_us=50.0, unique_bytes=1e8, flashinfer_composed_fa2_us=57.0)
    small = case(ours_us=400.0, unique_bytes=0.99e8)
    text = summary(result(near, small))
    assert "at least level (5 % noise) on 1 of 2" in text
    assert "0..64 query lanes: up to 1.20 x the floor (aim 1.2), 1 of 1" in text
