"""The comparison of the results page: planned, made in parts, and never made twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import headline, pictures
from bench.headline import Load, made, main, plan, results
from bench.load import trial
from bench.load.workload import Item
from tests.bench.served import serving

QUICK = ["--warmup", "0.1", "--window", "0.3", "--cooldown", "0.1", "--scale", "0.03", "--minutes", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A load that a server without a model serves in moments."""
    monkeypatch.setattr(headline, "LOADS", (Load("headline", 15),))
    monkeypatch.setattr(headline, "RIVALS", ("taper", "off"))
    monkeypatch.setattr(headline, "OTHERS", ("cap:2",))
    monkeypatch.setattr(headline, "SEEDS", (1, 2))
    monkeypatch.setattr(headline, "BY_CLIENT", Load("headline", 15, fork="client"))
    monkeypatch.setattr(headline, "ITS_POLICIES", ("taper",))
    monkeypatch.setattr(trial, "ALONE", Item(0.0, 20, ((200,),)))
    with serving() as server:
        monkeypatch.setattr(headline, "started", lambda arguments: contextlib.nullcontext(server))
        yield


def test_the_most_telling_runs_come_first() -> None:
    runs = [(run.load.fork, run.seed, run.policy) for run in plan()]
    assert runs[:3] == [("server", 1, "taper"), ("server", 1, "off"), ("client", 1, "taper")]
    assert runs[-1] == ("server", 1, "cap:2")
    assert len({*plan()}) == len(runs) == 7


@pytest.mark.full
def test_what_a_folder_lacks_is_made_and_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(main([str(tmp_path)])["missing"]) == 7  # no minutes, no run
    drawn: list[int] = []
    monkeypatch.setattr(pictures, "headline", lambda sources, path: drawn.append(len(sources)))
    assert main([str(tmp_path), "--plot", "PNG", *QUICK])["missing"] == []
    assert drawn == [1 + len([*tmp_path.iterdir()])], "of the simulated lines and all runs"
    assert {*made(results(tmp_path))} == {*plan()}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    main([str(tmp_path), *QUICK])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    printed = capsys.readouterr().out
    assert "7 runs are there, 0 are missing" in printed
    assert printed.count("\ntaper        2 ") == 2  # by the server and by the client, over two seeds

    (lost,) = tmp_path.glob("headline-15-by-client-seed2.json")
    lost.unlink()
    main([str(tmp_path), *QUICK])
    assert {*made(results(tmp_path))} == {*plan()}
    assert {path: path.read_bytes() for path in before if path != lost}.items() <= before.items()


def test_no_run_begins_that_would_not_end(tmp_path: Path) -> None:
    assert len(main([str(tmp_path), *QUICK, "--minutes", "0.001"])["missing"]) == 7


def test_a_run_that_was_made_twice_is_an_error(tmp_path: Path) -> None:
    def written(name: str, *, closed: bool) -> None:
        row, point = {"load": 40, "seed": 1, "policy": "off"}, {"load": 40, "seed": 1, "closed": closed}
        found = {"workload": "headline", "fork": "server", "points": [point], "rows": [row]}
        (tmp_path / name).write_text(json.dumps(found))

    written("a.json", closed=False)
    written("b.json", closed=True)
    assert [run.load.closed for run in made(results(tmp_path))] == [False, True]
    written("c.json", closed=True)
    with pytest.raises(ValueError, match="off at headline 40, seed 1, was made twice"):
        made(results(tmp_path))
