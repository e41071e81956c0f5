from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench.load.measures import Record
from bench.load.serve import (
    METRICS,
    Answered,
    command,
    figures,
    gamma_arrivals,
    load,
    main,
    random_items,
    table,
)
from bench.load.workload import Item, Lengths, open_loop
from tests.bench.served import Served, serving


def answered(stages: Lengths, times: list[float], tokens: int = 1) -> Answered:
    """A request that arrived at 0; so many tokens came at each of these times."""
    record = Record(Item(0.0, 10, stages), 0.0)
    for now in times:
        record.emit(now, tokens)
    record.finished = True
    gaps = [after - before for before, after in pairwise(times)]
    return Answered(record, 10, gaps)


SERIAL = answered(((5,),), [0.1, 0.2, 0.3, 0.4, 0.5])
SINGLE = answered(((1,),), [0.3])
FORKED = answered(((2, 2, 2),), [0.1, 0.5], tokens=3)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as it:
        yield it


def of(*requests: Answered, **goodput: float) -> dict[str, float | None]:
    return figures(requests, failed=1, duration=2.0, goodput=goodput, percentiles=[50, 99.9])


# --- definitions -------------------------------------------------------------------------------------------


def test_figures_are_those_of_vllm() -> None:
    found = of(SERIAL, SINGLE)
    assert (found["completed"], found["failed"], found["duration"]) == (2, 1, 2.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 6)
    assert (found["request_throughput"], found["output_throughput"]) == (1.0, 3.0)
    assert found["total_token_throughput"] == 13.0
    assert found["mean_ttft_ms"] == found["median_ttft_ms"] == found["p50_ttft_ms"] == pytest.approx(200)
    assert found["std_ttft_ms"] == pytest.approx(100)
    assert found["p99.9_ttft_ms"] == pytest.approx(100 + 0.999 * 200)
    assert found["mean_e2el_ms"] == pytest.approx(400)
    assert found["mean_tpot_ms"] == pytest.approx(100), "a single token has no time per output token"
    assert found["mean_itl_ms"] == pytest.approx(100)


def test_goodput_asks_for_all_targets_at_once() -> None:
    assert of(SERIAL, SINGLE)["request_goodput"] is None
    assert of(SERIAL, SINGLE, ttft=200.0)["request_goodput"] == 0.5
    assert of(SERIAL, SINGLE, ttft=400.0, tpot=99.0)["request_goodput"] == 0.5, "a single token's TPOT is 0"
    assert of(SERIAL, SINGLE, ttft=400.0, tpot=101.0, e2el=501.0)["request_goodput"] == 1.0


def test_branches_add_the_measures_of_stages() -> None:
    assert "mean_stage_tpot_ms" not in of(SERIAL)
    found = of(SERIAL, FORKED)
    assert found["mean_stage_tpot_ms"] == pytest.approx(400 / 5)
    assert found["mean_critical_tpot_ms"] == pytest.approx(400)
    assert found["mean_tpot_ms"] == pytest.approx((100 + 80) / 2)


def test_nothing_answered_leaves_nothing_to_measure() -> None:
    found = of(ttft=1.0)
    assert found["request_goodput"] == 0.0
    assert {found[f"mean_{name}_ms"] for name in METRICS if f"mean_{name}_ms" in found} == {None}
    assert "Mean TTFT (ms):                          -" in table(found, [50, 99.9])


# --- the load ----------------------------------------------------------------------------------------------


def test_random_lengths_fill_their_range() -> None:
    items = random_items(2000, 100, 10, 0.2, seed=1)
    prompts, outputs = [item.prompt for item in items], [item.tokens for item in items]
    assert (min(prompts), max(prompts)) == (80, 120)
    assert (min(outputs), max(outputs)) == (8, 12)
    assert np.mean(prompts) == pytest.approx(100, rel=0.01)
    assert {item.prompt for item in random_items(5, 100, 10, 0.0, seed=1)} == {100}


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed_and_end_on_time(burstiness: float) -> None:
    times = gamma_arrivals(4000, 5.0, burstiness, seed=2)
    assert times[-1] == pytest.approx(800)
    gaps = np.diff([0.0, *times])
    assert np.var(gaps) / np.mean(gaps) ** 2 == pytest.approx(1 / burstiness, rel=0.15)
    assert gamma_arrivals(3, math.inf, burstiness, seed=2) == [0.0, 0.0, 0.0]


def test_a_file_keeps_its_times_unless_a_rate_is_asked_for(tmp_path: Path) -> None:
    workload = open_loop("light", "poisson", 5.0, 10.0, seed=1)
    workload.save(tmp_path / "w.json")
    options = ["--workload", str(tmp_path / "w.json"), "--num-prompts", "5"]
    items, arrivals = load(command().parse_args(options))
    assert (items, arrivals) == ([*workload.items[:5]], [item.arrival for item in workload.items[:5]])
    same, others = load(command().parse_args([*options, "--request-rate", "2"]))
    assert same == items
    assert others[-1] == 2.5
    assert load(command().parse_args([*options, "--request-rate", "inf"]))[1] == [0.0] * 5


# --- against a server --------------------------------------------------------------------------------------


def test_a_run_reports_what_was_asked_for(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    options = ["--num-prompts", "6", "--random-input-len", "12", "--random-output-len", "7"]
    main(
        [*options, "--address", served.address, "--goodput", "e2el:60000", "--json", str(out), "--seed", "3"]
    )
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"], found["errors"]) == (6, 0, {})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (72, 42)
    assert found["request_goodput"] == found["request_throughput"] > 0
    assert 0 < found["mean_ttft_ms"] <= found["mean_e2el_ms"] < 1e3 * found["duration"]
    assert found["mean_e2el_ms"] == pytest.approx(found["mean_ttft_ms"] + 6 * found["mean_tpot_ms"])
    assert found["server"]["model"] == "tiny"
    assert "Successful requests:                     6" in capsys.readouterr().out


def test_branches_go_through_the_same_command(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--workload", "fanout", "--scale", "0.05", "--num-prompts", "8", "--save-detailed"]
    main([*options, "--address", served.address, "--request-rate", "100", "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], len(found["ttfts"])) == (8, 8)
    assert sum(found["output_lens"]) == found["total_output_tokens"]
    assert 0 < found["mean_stage_tpot_ms"] <= found["mean_critical_tpot_ms"]


def test_what_fails_is_counted_and_explained(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    found = main(["--address", served.address, "--num-prompts", "2", "--random-input-len", "5000"])
    assert (found["completed"], found["failed"], found["mean_ttft_ms"]) == (0, 2, None)
    assert "2 failed: INVALID_ARGUMENT" in capsys.readouterr().out


def test_without_a_server_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"bench\.load\.serve: .*connect"):
        main(["--address", "127.0.0.1:1", "--num-prompts", "1"])


@pytest.mark.parametrize("wrong", ["itl:5", "ttft", "tpot:fast"])
def test_a_target_that_is_none_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--goodput", wrong])
    assert "--goodput" in capsys.readouterr().err
