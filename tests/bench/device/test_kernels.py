from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest

from bench import hardware
from bench.device import kernels
from bench.device.kernels import KernelBench, Program, main, parse_options
from bench.device.shapes import PageTables

pytestmark = pytest.mark.usefixtures("quick_compiler")

DECODE = "--backend xla --scale tiny --suite decode --page 16 --seed 3"


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "copy_tb_s", lambda **_: 0.01)
    monkeypatch.setattr(hardware, "matmul_tflop_s", lambda **_: 0.1)


def no_attention(*_: object) -> Program:
    """A program that returns its queries."""
    return Program(once=lambda q, *_: q, loop=lambda q, *_: q)


def test_a_tiny_run_reports_every_shape_of_its_suites(tmp_path: Path) -> None:
    out = tmp_path / "results" / "kernels.json"
    words = "--backend xla --scale tiny --suite prefill --page 16 --random 1 --seed 3 --json"
    result = main(parse_options([*words.split(), str(out)]))
    assert json.loads(out.read_text()) == result
    assert [case["suite"] for case in result["cases"]] == ["prefill", "prefill", "random"]
    assert all(case["ours_us"] > 0 for case in result["cases"])
    assert result["copy_tb_s"] > 0
    assert result["matmul_tflop_s"] > 0


class OneForAll:
    """In place of FlashInfer: every variant gives ones in a known time, but one that cannot run."""

    def __init__(self) -> None:
        self.times = iter([2e-6, 3e-6] * 16 + [9e-6] * 16)

    def tensor(self, array: jax.Array) -> np.ndarray:
        return np.asarray(array)

    def plan(self, variant: str, tables: PageTables, q: np.ndarray, scale: float) -> Callable[..., Any]:
        if variant == "flat":
            raise RuntimeError("no such kernel")
        result = MagicMock()
        result.float().cpu().numpy.return_value = np.ones(q.shape, np.float32)
        return lambda k, v: result

    def graph_seconds(self, run: Any, pages: list[Any], expected: float) -> float:
        assert len({id(run(*pair)) for pair in pages}) == 1
        return next(self.times)


@pytest.mark.usefixtures("known_ceilings")
def test_peers_are_timed_beside_ours_and_the_weak_ones_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelBench, "compile", no_attention)
    monkeypatch.setattr(kernels, "FlashInfer", OneForAll)
    words = "--backend xla --scale tiny --suite shared --page 16 --seed 3 --peers flashinfer"
    cases = KernelBench(parse_options(words.split())).run()["cases"]
    assert len(cases) == 16
    for case in cases:
        assert case["flashinfer_composed_us"] == pytest.approx(2)
        assert case["flashinfer_composed_fa2_us"] == pytest.approx(3)
        assert case["flashinfer_cascade_us"] == pytest.approx(9)
        assert case["flashinfer_composed_fa2_error"] > 0.1
        assert case["errors"] == {"flat": "RuntimeError: no such kernel"}


@pytest.mark.usefixtures("known_ceilings")
def test_nothing_is_measured_after_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelBench, "compile", no_attention)
    options = parse_options([*DECODE.split(), "--budget-seconds", "0"])
    assert KernelBench(options).run()["cases"] == []


@pytest.mark.usefixtures("known_ceilings")
def test_a_shape_that_does_not_compile_is_reported_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail_for_two_heads(bench: KernelBench, q: jax.Array, *_: object) -> Program:
        if q.shape[1] == 2:
            raise RuntimeError("too few heads")
        return no_attention()

    monkeypatch.setattr(KernelBench, "compile", fail_for_two_heads)
    first, second = KernelBench(parse_options(DECODE.split())).run()["cases"]
    assert "ours_us" in first
    assert second["error"] == "RuntimeError: too few heads"
