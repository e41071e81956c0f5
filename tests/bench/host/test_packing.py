from __future__ import annotations

from pathlib import Path

from bench.device.shapes import Shape
from bench.host import packing


def test_it_times_both_planners(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(packing, "CASES", ((2, 3, 128, 70), (4, 1, 0, 65)))
    result = packing.main(["--repeats", "1", "--json", str(tmp_path / "out.json")])
    assert [case["backend"] for case in result["cases"]] == ["gpu", "xla"] * 4
    assert all(case["step_inputs_us"] > 0 < case["plan_us"] for case in result["cases"])
    assert (tmp_path / "out.json").exists()
    assert "2x3 128+70" in capsys.readouterr().out


def test_a_step_gives_every_page_out_once() -> None:
    entries = packing.step_of(Shape("decode", 2, 3, 128, 70, 64, 8, 8)).entries
    contexts = {id(entry.context): entry.context for entry in entries}.values()
    segments = [segment for context in contexts for segment in context] + [entry.own for entry in entries]
    assert sorted(page for segment in segments for page in segment.pages) == list(range(2 * 2 + 6 * 2))
