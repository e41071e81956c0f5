from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import server as server_module
from bench.load import goodput
from bench.load import trial as module
from bench.load.driver import Driver, Reply
from bench.load.goodput import command, main, points
from bench.load.measures import COLUMNS
from bench.load.workload import Item, closed_loop, open_loop
from serve.lateness import CAUSES
from taper_client.client import AsyncClient
from tests.bench.served import Served, serving

SHORT = ["--scale", "0.03", "--warmup", "0.1", "--window", "0.3", "--cooldown", "0.1"]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as it:
        yield it


@pytest.fixture(autouse=True)
def short_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALONE", Item(0.0, 20, ((200,),)))


def compare(server: Served, *options: str) -> dict[str, Any]:
    address = ["--address", server.address, "--metrics-url", server.metrics_url]
    return main([*address, *SHORT, "--tpot-slo", "0.05", *options])


# --- all policies on one server ----------------------------------------------------------------------------


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The policies that the server was set to, and when it was waited for, in order."""
    happened: list[str] = []
    set_policy, drained = AsyncClient.set_policy, goodput.drained

    async def noted_policy(client: AsyncClient, policy: str) -> None:
        happened.append(policy)
        await set_policy(client, policy)

    async def noted_drained(client: AsyncClient) -> None:
        happened.append("drained")
        await drained(client)

    monkeypatch.setattr(AsyncClient, "set_policy", noted_policy)
    monkeypatch.setattr(goodput, "drained", noted_drained)
    return happened


def test_a_client_that_forks_by_itself_gets_the_same_tokens(server: Served) -> None:
    asked = ["--policies", "eager", "--rates", "15", "--fork"]
    by_server, by_client = (compare(server, *asked, fork)["rows"][0] for fork in ("server", "client"))
    assert by_client["finished"] == by_server["finished"] == by_server["arrived"] > 0
    assert by_client["errors"] == {}
    assert by_client["attainment_stage"] is not None
    assert by_client["calls"] > by_server["calls"] == 1
    assert by_client["messages"] > by_server["messages"]


def test_every_policy_serves_the_same_requests(server: Served, tmp_path: Path, done: list[str]) -> None:
    out = tmp_path / "result.json"
    options = ["--policies", "off,eager", "--rates", "15,30", "--tpot-slo", "auto", "--json", str(out)]
    found = compare(server, *options)
    assert json.loads(out.read_text()) == found
    rows = found["rows"]
    assert [(row["load"], row["seed"], row["policy"]) for row in rows] == [
        (rate, 1, policy) for rate in (15, 30) for policy in ("off", "eager")
    ]
    assert found["left_out"] == []
    for row in rows:
        point = next(p for p in found["points"] if (p["load"], p["seed"]) == (row["load"], row["seed"]))
        workload = open_loop("fanout", "bursty", row["load"], 0.5, row["seed"]).scaled(0.03)
        assert point["sha256"] == workload.digest
        assert row["arrived"] == sum(0.1 <= item.arrival < 0.4 for item in workload.items) > 0
        assert row["finished"] == row["arrived"]
        assert row["errors"] == {}
    assert COLUMNS.keys() < rows[0].keys()
    assert all(0.0 <= rows[0][f"late_{cause}"] <= 1.0 for cause in CAUSES)
    widths = {policy: [r["mean_width"] for r in rows if r["policy"] == policy] for policy in ("off", "eager")}
    assert max(widths["off"]) < 1.2 < 2 < min(widths["eager"])
    off = rows[0]["server"]
    assert (off["width_branches"], off["step_externality_seconds"]) == (1.0, 0.0)
    assert rows[1]["server"]["width_branches"] > 2
    assert found["tpot_slo_ms"] == pytest.approx(2 * found["unloaded_tpot_ms"])
    assert server.engine.load().scheduler.running_requests == 0, "it is drained in the end"
    assert server.engine.policy == found["server"]["policy"], "it has the policy that it had"
    runs = ["off", "drained", "eager", "drained"]
    assert done == ["off", *runs, *runs, found["server"]["policy"]], "its targets are those of off"


def test_a_closed_loop_keeps_its_clients_busy(server: Served, tmp_path: Path) -> None:
    closed_loop("fanout", 3, 200, seed=2).save(tmp_path / "w.json")
    found = compare(server, "--workload", str(tmp_path / "w.json"), "--policies", "eager", "--seeds", "2,2")
    for row in found["rows"]:
        assert (row["load"], row["errors"], row["finished"]) == (3, {}, row["arrived"])
        assert 3 < row["arrived"] < 200
        assert row["server"]["running_requests"] <= 3
    assert len(found["rows"]) == 2


def test_a_closed_loop_that_runs_dry_is_no_measurement(server: Served) -> None:
    with pytest.raises(SystemExit, match="5 requests do not last"):
        compare(server, "--workload", "headline-closed", "--clients", "5", "--policies", "eager")


def test_targets_can_be_given(server: Served) -> None:
    found = compare(server, "--policies", "off", "--rates", "30", "--tpot-slo", "0.25", "--ttft-slo", "2")
    assert (found["tpot_slo_ms"], found["ttft_slo_s"]) == (250.0, 2.0)
    assert "unloaded_tpot_ms" not in found
    assert found["rows"][0]["attainment_stage"] == 1.0


def test_a_budget_leaves_out_what_would_not_fit(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not even begun: its window alone would end too late."""
    monkeypatch.setattr(module.Trial, "play", None)
    found = compare(server, "--policies", "off,eager", "--budget-seconds", "0.3")
    assert found["rows"] == []
    assert [point["policy"] for point in found["left_out"]] == ["off", "eager"]


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(self: Driver, request: bytes, reply: Reply) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Driver, "ask", ask)


@pytest.mark.usefixtures("unanswered")
def test_a_run_that_is_cut_off_is_no_row(server: Served) -> None:
    found = compare(server, "--policies", "off", "--rates", "30", "--budget-seconds", "0.8")
    assert (found["rows"], len(found["left_out"])) == ([], 1)


@pytest.mark.usefixtures("unanswered")
def test_requests_that_are_not_served_in_time_are_given_up(server: Served) -> None:
    (row,) = compare(server, "--policies", "off", "--rates", "30", "--drain", "0.01")["rows"]
    assert row["arrived"] > 0
    assert (row["finished"], row["attainment_mean"], row["ttft_attainment"]) == (0, 0.0, 0.0)


def test_what_was_measured_is_kept_when_something_fails(server: Served, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--rates", "30", "--json", str(out)]
    found = compare(server, "--policies", "off,none", *options)
    assert [row["policy"] for row in found["rows"]] == ["off"]
    assert "InvalidRequestError" in json.loads(out.read_text())["stopped"]
    with pytest.raises(SystemExit, match="none"):
        compare(server, "--policies", "none", *options)


def test_points_are_of_the_loads_and_arrivals_that_were_asked_for() -> None:
    typed = "--workload light --rates 2,3 --seeds 4,5 --arrivals poisson --warmup 1 --window 2 --cooldown 3"
    found = [*points(command().parse_args(typed.split()))]
    wanted = [(rate, seed) for rate in (2.0, 3.0) for seed in (4, 5)]
    assert [(load, seed) for load, seed, _ in found] == wanted
    for (rate, seed), (_, _, workload) in zip(wanted, found, strict=True):
        for arrivals in ("bursty", "poisson"):
            same = workload.digest == open_loop("light", arrivals, rate, 6.0, seed).digest
            assert same is (arrivals == "poisson")


def test_a_file_is_one_point_and_has_no_other_rate(tmp_path: Path) -> None:
    open_loop("light", "poisson", 3.0, 2.0, seed=5).save(tmp_path / "w.json")
    options = ["--workload", str(tmp_path / "w.json")]
    assert [(load, seed) for load, seed, _ in points(command().parse_args(options))] == [(3.0, 5)]
    with pytest.raises(ValueError, match="arrivals of its own"):
        next(points(command().parse_args([*options, "--rates", "1"])))


def test_a_server_that_does_not_start_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "PROGRAM", "raise SystemExit('no such model')")
    with pytest.raises(SystemExit, match="did not start"):
        main(["--policies", "off", "--", "--model", "none"])


def test_without_a_server_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"bench\.load\.goodput: "):
        main(["--address", "127.0.0.1:1"])
