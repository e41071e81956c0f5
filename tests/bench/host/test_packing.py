from __future__ import annotations

from pathlib import Path

from attention import backend_named
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


def test_a_row_stands_at_the_end_of_its_prefix_and_its_tail() -> None:
    for entry in packing.step_of(Shape("decode", 1, 2, 128, 70, 64, 8, 8)).entries:
        assert (entry.start, entry.ordinal, entry.rows) == (128 + 69, 69, 1)
        assert sum(read.length for read in entry.context) + entry.own.length == entry.start + entry.rows


def test_times_are_in_microseconds(monkeypatch) -> None:
    monkeypatch.setattr(packing, "median_seconds", lambda call, repeats: 2.5e-6)
    row = packing.measure(Shape("decode", 1, 2, 128, 70, 64, 8, 8), backend_named("xla"), 1)
    assert (row["plan_us"], row["step_inputs_us"]) == (2.5, 2.5)
