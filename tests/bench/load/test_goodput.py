from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.load import goodput as module
from bench.load.driver import Driver, Reply
from bench.load.goodput import Run, Setting, main, parser, points, scrape, served, server_row
from bench.load.measures import client_row
from bench.load.workload import Item, Workload, closed_loop, open_loop
from scheduler.request import Slo
from tests.bench.load.test_driver import END, delta, reply, stage, width
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


# --- the row of a policy -----------------------------------------------------------------------------------


def played(*arrivals: float) -> Run:
    """Requests for three tokens, answered 1 s and 2 s after they were due; the clock starts at 100 s."""
    items = tuple(Item(at, 4, ((2, 1),)) for at in arrivals)
    setting = Setting(
        workload=Workload("hand-made", "poisson", 0, items),
        slo=Slo(tpot=0.6, ttft=5.0),
        warmup=1.0,
        end=11.0,
        drain=1.0,
        vocab_size=10,
    )
    run = Run(setting, "off", start=100.0, cpu_share=0.1)
    for at in arrivals:
        answered = reply(
            [stage(0, (1, 0), (2, 0)), delta(1, 1)],
            [width(2), delta(1, 2), delta(2, 1), END],
        )
        answered.due, answered.sent = 100.0 + at, 100.25 + at
        answered.messages = [(100.0 + at + after, raw) for after, raw in answered.messages]
        run.replies.append(answered)
    return run


def test_a_row_is_of_what_arrived_in_the_window() -> None:
    row = played(0.0, 1.0, 5.0, 10.9, 11.0).row()
    assert (row["arrived"], row["finished"], row["errors"]) == (3, 3, {})
    assert (row["attainment_mean"], row["goodput_mean"]) == (1.0, 9 / 10)
    assert row["good_requests_s_mean"] == pytest.approx(0.3)
    assert (row["attainment_critical"], row["good_requests_s_critical"]) == (0.0, 0.0), "1 s for a token"
    assert (row["serial_attainment"], row["parallel_attainment"]) == (None, 1.0)
    assert row["gap_p99_ms"] == pytest.approx(1000)
    assert row["send_lag_p99_ms"] == pytest.approx(250)
    assert row["e2e_p50_s"] == pytest.approx(2)


def test_tokens_and_width_are_of_what_came_in_the_window_whoever_asked() -> None:
    """The first brings three tokens in the window, in two steps; the last but one, none: it came too late."""
    row = played(0.0, 10.9, 11.0).row()
    assert row["raw_tokens_s"] == pytest.approx(3 / 10)
    assert row["mean_width"] == pytest.approx(3 / 2)


def test_what_was_not_answered_counts_against_the_policy() -> None:
    run = played(2.0, 3.0)
    run.replies[1].messages.pop()
    run.replies[1].error = "RESOURCE_EXHAUSTED: full"
    row = run.row()
    assert (row["arrived"], row["finished"]) == (2, 1)
    assert row["attainment_mean"] == row["ttft_attainment"] == 0.5
    assert row["errors"] == {"RESOURCE_EXHAUSTED: full": 1}


def test_nothing_in_the_window_is_null_and_not_a_number() -> None:
    row = played(0.0).row()
    assert (row["arrived"], row["attainment_stage"], row["gap_p99_ms"]) == (0, None, None)
    json.dumps({**row, "mean_width": row["mean_width"]}, allow_nan=False)


# --- all policies on one server ----------------------------------------------------------------------------


def test_every_policy_serves_the_same_requests(server: Served, tmp_path: Path) -> None:
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
    assert set(client_row([], 1.0, tpot_slo=1.0, ttft_slo=1.0)) < set(rows[0])
    widths = {policy: [r["mean_width"] for r in rows if r["policy"] == policy] for policy in ("off", "eager")}
    assert max(widths["off"]) < 1.2 < 2 < min(widths["eager"])
    off = rows[0]["server"]
    assert (off["width_branches"], off["step_externality_seconds"]) == (1.0, 0.0)
    assert rows[1]["server"]["width_branches"] > 2
    assert found["tpot_slo_ms"] == pytest.approx(2 * found["unloaded_tpot_ms"])
    assert server.engine.load().running_requests == 0, "it is drained in the end"
    assert server.engine.policy == found["server"]["policy"], "it has the policy that it had"


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


def test_a_budget_leaves_out_what_would_not_fit(server: Served) -> None:
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


def test_a_file_is_one_point_and_has_no_other_rate(tmp_path: Path) -> None:
    open_loop("light", "poisson", 3.0, 2.0, seed=5).save(tmp_path / "w.json")
    options = ["--workload", str(tmp_path / "w.json")]
    assert [(load, seed) for load, seed, _ in points(parser().parse_args(options))] == [(3.0, 5)]
    with pytest.raises(ValueError, match="arrivals of its own"):
        next(points(parser().parse_args([*options, "--rates", "1"])))


# --- what the server says of itself ------------------------------------------------------------------------


def test_metrics_are_those_of_the_time_between_two_scrapes() -> None:
    before = {
        "step_sum": 1.0,
        "step_count": 10.0,
        "tokens_total": 5.0,
        'x_sum{a="b"}': 0.0,
        'x_count{a="b"}': 0.0,
    }
    after = {
        "step_sum": 4.0,
        "step_count": 16.0,
        'step_bucket{le="1"}': 3.0,
        "step_created": 1e9,
        "tokens_total": 25.0,
        'x_sum{a="b"}': 0.0,
        'x_count{a="b"}': 0.0,
        "running": 2.0,
        "unknown": float("nan"),
    }
    assert server_row(before, after) == {
        "step": 0.5,
        "step_count": 6.0,
        "tokens_total": 20.0,
        'x{a="b"}': None,
        'x_count{a="b"}': 0.0,
        "running": 2.0,
        "unknown": None,
    }
    assert server_row({}, {}) == scrape(None) == {}


# --- a server of its own -----------------------------------------------------------------------------------

FAKE = """
import signal, sys, time
print("a table first", flush=True)
print("taper-serve ready on 127.0.0.1:4242", flush=True)
print(*sys.argv[1:], flush=True)
signal.sigwait([signal.SIGTERM])
print("stopped", flush=True)
"""


def test_a_server_of_its_own_runs_as_long_as_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = FAKE.replace("import signal", "import signal; signal.pthread_sigmask(0, [15]); import signal")
    monkeypatch.setattr(module, "SERVER", program)
    with served(["--model", "tiny"]) as (address, url):
        assert address == "127.0.0.1:4242"
        assert url.startswith("http://127.0.0.1:")
    said = capfd.readouterr().err
    assert said.startswith("a table first\ntaper-serve ready")


def test_a_server_that_does_not_start_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SERVER", "raise SystemExit('no such model')")
    with pytest.raises(SystemExit, match="did not start"):
        main(["--policies", "off", "--", "--model", "none"])


def test_without_a_server_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"bench\.goodput: "):
        main(["--address", "127.0.0.1:1"])
