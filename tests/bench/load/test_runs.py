from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.load.goodput import command
from bench.load.runs import Load, Made, Run, made, results


def result(**changes: Any) -> dict[str, Any]:
    row, point = {"load": 40, "seed": 1, "policy": "off"}, {"load": 40, "seed": 1}
    return {"workload": "headline", "points": [point], "rows": [row], **changes}


def test_a_run_that_was_made_twice_is_an_error(tmp_path: Path) -> None:
    closed = {"points": [{"load": 40, "seed": 1, "closed": True}]}
    kinds = [{}, closed, {"fork": "client"}, {"reject_late": True}]
    for number, kind in enumerate(kinds):
        (tmp_path / f"{number}.json").write_text(json.dumps(result(**kind)))
    loads = [run.load for run in made(results(tmp_path))]
    assert loads == [
        Load("headline", 40),
        Load("headline", 40, closed=True),
        Load("headline", 40, fork="client"),
        Load("headline", 40, reject=True),
    ]
    (tmp_path / "again.json").write_text(json.dumps(result(**closed)))
    with pytest.raises(ValueError, match="off at headline 40, seed 1 was made twice"):
        made(results(tmp_path))


@pytest.mark.parametrize("reject", [False, True])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("fork", ["server", "client"])
def test_a_load_is_asked_for_in_the_words_of_the_comparison(reject: bool, closed: bool, fork: str) -> None:
    options = command().parse_args(Load("mixed", 8, closed, fork, reject).arguments)
    assert (options.workload, options.fork, options.reject_late) == ("mixed", fork, reject)
    assert (options.rates, options.clients) == ((None, [8]) if closed else ([8.0], None))


def test_files_are_named_by_all_that_tells_runs_apart() -> None:
    assert Run(Load("headline", 1.4), 1, "cap:4").file == "headline-1.4-seed1-cap4.json"
    load = Load("headline", 2.1, fork="client", reject=True)
    assert Run(load, 3, "off").file == "headline-2.1-by-client-refused-seed3-off.json"


def test_a_gap_is_told_in_targets() -> None:
    row: dict[str, Any] = {"arrived": 20, "attainment_stage": 0.95, "gap_p99_ms": 40.0}
    assert (Made(row, {"tpot_slo_ms": 32.0}).gap, Made(row, {}).good) == (1.25, 19)
    nothing: dict[str, Any] = {"arrived": 0, "attainment_stage": None, "gap_p99_ms": None}
    assert (Made(nothing, {}).gap, Made(nothing, {}).good) == (None, 0)
