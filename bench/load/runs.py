"""A run: a policy at a load with one seed, and the folder of results in which each is at most once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.load.workload import Fork


class Load(NamedTuple):
    """A workload by its name, and requests a second; or clients, in a closed loop.

    fork    who divides answers into branches, and joins them
    reject  whether requests would rather be refused than late
    """

    workload: str
    amount: float
    closed: bool = False
    fork: Fork = "server"
    reject: bool = False

    @property
    def arguments(self) -> list[str]:
        """Of bench.load.goodput."""
        amount = ["--clients" if self.closed else "--rates", f"{self.amount:g}"]
        return ["--workload", self.workload, *amount, "--fork", self.fork, *["--reject-late"] * self.reject]

    def __str__(self) -> str:
        by_client = "" if self.fork == "server" else ", forked by the client"
        refused = ", refused if late" if self.reject else ""
        return f"{self.workload} {self.amount:g}{by_client}{refused}"


class Run(NamedTuple):
    load: Load
    seed: int
    policy: str

    def __str__(self) -> str:
        return f"{self.policy} at {self.load}, seed {self.seed}"

    @property
    def file(self) -> str:
        """The name of its file."""
        load, policy = self.load, self.policy.replace(":", "")
        by_client = "" if load.fork == "server" else "-by-client"
        refused = "-refused" if load.reject else ""
        return f"{load.workload}-{load.amount:g}{by_client}{refused}-seed{self.seed}-{policy}.json"

    @classmethod
    def of(cls, result: Mapping[str, Any], row: Mapping[str, Any]) -> Run:
        """Which one a row is. Older results do not say what there was only one way of."""
        at = row["load"], row["seed"]
        point = next(each for each in result["points"] if (each["load"], each["seed"]) == at)
        load = Load(
            result["workload"],
            row["load"],
            point.get("closed", False),
            result.get("fork", "server"),
            result.get("reject_late", False),
        )
        return cls(load, row["seed"], row["policy"])


class Made(NamedTuple):
    """A run's row, and the result that it is of."""

    row: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def good(self) -> int:
        """Requests that met their targets, by the stage measure."""
        return round(self.row["arrived"] * (self.row["attainment_stage"] or 0.0))

    @property
    def gap(self) -> float | None:
        """The p99 gap between messages, in TPOT targets."""
        gap = self.row["gap_p99_ms"]
        return None if gap is None else gap / self.result["tpot_slo_ms"]


def reserved(result: Mapping[str, Any]) -> float:
    """The share of KV that its server reserved. Older results do not say, as all did, and those of a server
    that was there already."""
    return result.get("reserve", 1.0)


def results(folder: Path) -> list[dict[str, Any]]:
    """Of bench.load.goodput, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def made(found: Iterable[Mapping[str, Any]]) -> dict[Run, Made]:
    """Raises ValueError if a run was made twice: one of the two would be a choice."""
    runs: dict[Run, Made] = {}
    for result in found:
        for row in result["rows"]:
            run = Run.of(result, row)
            if run in runs:
                raise ValueError(f"{run} was made twice")
            runs[run] = Made(row, result)
    return runs
