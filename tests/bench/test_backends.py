"""One table of what was measured here, what was estimated, and what came from elsewhere."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jax.errors import JaxRuntimeError

from attention.tpu import Tpu
from bench import backends
from bench.backends import Measuring, command, main
from bench.device.cases import CASES, LIKE, STEP, Row, earlier, shape_of, table
from bench.device.kernels import KernelBench
from bench.tpu import cases as tpu_cases
from bench.tpu.cycles import AttentionCycles, WriteCycles
from bench.tpu.topology import TopologyError
from bench.tpu_aot import Target
from model.config import PRESETS
from model.sharding import Placement

QWEN3 = PRESETS["qwen3-32b"]
HEAD = {
    "command": "python -m bench.device",
    "time": "2026-11-22T15:59:13Z",
    "hardware": {"device": "H200"},
    "versions": {"python": "3.12.3", "jax": "0.11.2"},
    "backend": "gpu",
    "copy_tb_s": 4.0,
}


def row(case: str = STEP, **changes: Any) -> Row:
    of_a_row: dict[str, Any] = {
        "case": case,
        "shape": "8 x 8, 2048 + 192",
        "backend": "tpu-v5e",
        "device": "TPU v5 lite",
        "devices": 8,
        "model": "qwen3-32b",
        "layers": 64,
        "how": "estimated",
        "seconds": 0.0125,
        "floor_seconds": 0.01,
        "tb_s": 0.819,
        "ran_on": "2026-11-28T12:00:00Z, jax 0.10.2",
    }
    return Row(**{**of_a_row, **changes})


@pytest.mark.usefixtures("quick_compiler")
def test_every_case_is_measured_here_and_beside_it_what_is_not_here_is_marked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tpu_cases, "estimated", lambda *_: {"rows": [row().as_json()]})
    other, out = tmp_path / "other.json", tmp_path / "out.json"
    elsewhere = row(device="H100", backend="gpu", how="measured").as_json()
    other.write_text(json.dumps({**HEAD, "rows": [elsewhere]}))
    asked = ["--backend", "xla", "--scale", "tiny", "--tensor-parallel", "2", "--estimate", "v5e:2x4"]
    result = main([*asked, "--with", str(other), "--json", str(out)])
    assert json.loads(out.read_text()) == result
    there, *here, guessed = result["rows"]
    assert (there, guessed) == (elsewhere, row().as_json())
    assert [each["case"] for each in here] == [*CASES]
    for each in here:
        assert (each["how"], each["backend"], each["devices"]) == ("measured", "xla", 2)
        assert each["seconds"] > 0
        assert each["over_floor"] == pytest.approx(each["seconds"] / each["floor_seconds"])
    assert [each["layers"] for each in here] == [1, 1, 1, 2]
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if " measured " in line]) == 5
    assert len([line for line in printed if " estimated " in line]) == 1


def test_nothing_is_measured_or_estimated_if_nothing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--backend", "--estimate", "--json", "-"])["rows"] == []
    assert json.loads(capsys.readouterr().out)["rows"] == []


def test_the_rows_of_a_backend_are_kept_if_the_next_one_ends_it_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rows(self: Measuring) -> list[Row]:
        if self.backend == "reference":
            raise MemoryError
        return [row()]

    monkeypatch.setattr(Measuring, "rows", rows)
    out = tmp_path / "out.json"
    with pytest.raises(MemoryError):
        main(["--backend", "xla", "reference", "--estimate", "--json", str(out)])
    assert json.loads(out.read_text())["rows"] == [row().as_json()]


def test_a_cpu_measures_a_small_model_unless_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, int, str]] = []

    def rows(self: Measuring) -> list[Row]:
        measured.append((self.config.name, self.config.num_layers, self.backend))
        return []

    monkeypatch.setattr(Measuring, "rows", rows)
    for asked in ([], ["--model", "qwen3-1.7b", "--backend", "reference"], ["--layers", "1"]):
        assert not any(backends.measure(command().parse_args(asked)))
    assert measured == [("qwen3-0.6b", 2, "xla"), ("qwen3-1.7b", 28, "reference"), ("qwen3-0.6b", 1, "xla")]


@pytest.mark.parametrize(
    ("libtpu", "platform", "topologies"),
    [(True, "cpu", [*backends.TOPOLOGIES]), (True, "tpu", []), (False, "gpu", [])],
)
def test_tpus_are_estimated_where_there_is_none_and_something_to_compile_with(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    libtpu: bool,
    platform: str,
    topologies: list[str],
) -> None:
    asked: list[str] = []

    def estimated(topology: str, model: str, layers: int | None) -> dict[str, Any]:
        assert (model, layers) == ("qwen3-32b", None)
        asked.append(topology)
        return {"rows": []}

    monkeypatch.setattr(tpu_cases, "estimated", estimated)
    monkeypatch.setattr(backends, "installed", lambda: libtpu)
    monkeypatch.setattr("jax.default_backend", lambda: platform)
    assert backends.estimate(command().parse_args([])) == []
    assert asked == topologies
    assert ("needs libtpu" in capsys.readouterr().out) is not libtpu


def kernel_case(case: str, lengths: tuple[str, int, int, int, int], **changes: Any) -> dict[str, Any]:
    """As bench.device.kernels has it."""
    names = ("suite", "groups", "width", "prefix", "tail")
    return {
        **dict(zip(names, lengths, strict=True)),
        "page": 64,
        "q_heads": 64,
        "kv_heads": 8,
        "head_dim": 128,
        "ragged": None,
        "ours_us": 250.0,
        "floor_us": 200.0,
        "arithmetic_us": 50.0,
        "case": case,
        **changes,
    }


def test_kernels_that_were_timed_before_are_rows_of_the_cases_that_they_are_like() -> None:
    like = [kernel_case(case, LIKE.get(case, CASES[case])) for case in CASES if case != STEP]
    others = [
        kernel_case("narrow", CASES["decode, unshared"], q_heads=16),
        kernel_case("small pages", CASES["decode, unshared"], page=16),
        kernel_case("random", CASES["decode, unshared"], ragged=7),
        kernel_case("long", ("shared", 16, 16, 4096, 512)),
    ]
    rows = earlier({**HEAD, "cases": [*others, *like]}, QWEN3)
    assert [(each.case, each.shape) for each in rows] == [
        ("decode, unshared", "64 x 1, 0 + 4096"),
        ("decode, shared", "4 x 16, 4096 + 256"),
        ("prompt chunk", "1 x 1, 8192 + 512"),
    ]
    for each in rows:
        assert (each.how, each.device, each.devices, each.layers) == ("measured", "H200", 1, 1)
        assert each.over_floor == pytest.approx(1.25)
        assert each.ran_on == "2026-11-22T15:59:13Z, jax 0.11.2"
    line = " ".join(table(rows).splitlines()[1].split())
    assert line == "H200, gpu qwen3-32b, 1 measured 200.00 250.00 1.25 5.00 64 x 1, 0 + 4096"
    own = kernel_case("decode, shared", CASES["decode, shared"], ours_us=220.0)
    assert earlier({**HEAD, "cases": [*like, own]}, QWEN3)[1].shape == "8 x 8, 2048 + 192"


def test_a_step_that_was_timed_before_is_a_row() -> None:
    one = {"groups": 8, "width": 8, "prefix": 2048, "tail": 192, "step_ms": 21.0, "floor_ms": 17.5}
    result = {**HEAD, "model": "qwen3-32b", "layers": 64, "cases": [one, {**one, "groups": 16}]}
    (found,) = earlier(result, QWEN3)
    assert (found.case, found.model, found.layers, found.how) == (STEP, "qwen3-32b", 64, "measured")
    assert found.over_floor == pytest.approx(1.2)


def test_other_results_are_refused() -> None:
    with pytest.raises(ValueError, match="not a result of"):
        earlier({**HEAD, "cases": [{"goodput": 1}]}, QWEN3)


def test_what_did_not_run_is_said_with_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [kernel_case(case, CASES[case]) for case in CASES if case != STEP]
    cases[1] = {**cases[1], "error": "Unsupported: no such kernel"}
    del cases[1]["ours_us"]
    result = {**HEAD, "hardware": {"device": "H100"}, "cases": cases}

    def none(*_: Any, **__: Any) -> None:
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: more than there is")

    monkeypatch.setattr(KernelBench, "run", lambda _: result)
    monkeypatch.setattr(backends, "StepBench", none)
    rows = Measuring("xla", QWEN3, Placement(), small=False).rows()
    assert [each.over_floor is None for each in rows] == [False, True, False, True]
    said = table(rows)
    assert "did not run: Unsupported: no such kernel" in said
    assert "did not run: RESOURCE_EXHAUSTED: more than there is" in said


def target(rows: int) -> Target:
    """Of a model on one chip."""
    placement: Any = Placement(device=SimpleNamespace(device_kind="TPU v5 lite", coords=(0, 0, 0)))
    small = PRESETS["qwen3-0.6b"]
    return Target("v5e:2x2", small, placement, Tpu(), rows=rows, num_pages=4096, page_size=64)


def test_estimated_rows_are_no_faster_than_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = {16: 1, 64: 1, 128: 1}
    attend = AttentionCycles(heads=2, updates=lanes, masked=lanes, page=1, mask=1, block=1, tile=1, once=1)
    monkeypatch.setattr(tpu_cases, "cycles", lambda *_: (attend, WriteCycles(once=1)))
    monkeypatch.setattr(tpu_cases, "target_of", lambda _, __, rows: target(rows))
    said: dict[str, Any] = {"fits": True, "estimate_seconds": 0.02}
    monkeypatch.setattr(tpu_cases, "measure", lambda *_: said)
    rows = tpu_cases.rows_of("v5e:2x2", target(64).config, "now")
    assert [(each.case, each.how, each.layers) for each in rows] == [
        *((case, "estimated", 1) for case in CASES if case != STEP),
        (STEP, "estimated", 28),
    ]
    # A chunk's tiles read its prefix more than once; the others read whole pages of what they need.
    assert [each.over_floor for each in rows[:2]] == [pytest.approx(1), pytest.approx(1)]
    assert rows[2].over_floor is not None
    assert rows[2].over_floor >= 1
    assert rows[3].seconds == 0.02
    said |= {"fits": False}
    assert tpu_cases.rows_of("v5e:2x2", target(64).config, "now")[3].error == "does not fit"


def test_estimates_are_made_in_a_process_that_sees_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        assert command[1:] == [
            *("-m", "bench.tpu.cases", "--topology=v5e:2x4", "--model=qwen3-32b", "--json=-", "--layers=2")
        ]
        assert env["JAX_PLATFORMS"] == "cpu"
        return SimpleNamespace(returncode=0, stdout='{"rows": []}', stderr="")

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(subprocess, "run", run)
    assert tpu_cases.estimated("v5e:2x4", "qwen3-32b", 2) == {"rows": []}
    failed = SimpleNamespace(returncode=1, stdout="", stderr="libtpu knows no topology 'v5e:9x9'")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(TopologyError, match="knows no topology 'v5e:9x9'"):
        tpu_cases.estimated("v5e:9x9", "qwen3-32b", None)


def test_each_device_reads_its_share_of_the_heads() -> None:
    placement: Any = SimpleNamespace(parts=lambda axis: {"heads": 16, "kv_heads": 8}[axis])
    shape = shape_of("decode, shared", QWEN3, placement)
    assert (shape.q_heads, shape.kv_heads, shape.kv_tokens) == (4, 1, 8 * 2048 + 64 * 192)
