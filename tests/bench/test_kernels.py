from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from bench import hardware
from bench.kernels import KernelBench, Program, main, parse_options

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
