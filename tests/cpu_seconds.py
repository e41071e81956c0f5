"""What the tests cost, in CPU seconds, which do not depend on what else the machine does: `pytest --cpu`.

Of each test all threads of its process are counted, and the processes that it waited for. The first test to
ask for a shared fixture is charged with it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

SINCE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu",
        type=int,
        metavar="N",
        help="print CPU seconds: of the N dearest tests, each folder, everything",
    )


def used() -> float:
    """Seconds of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cpu") is not None:
        config.pluginmanager.register(CpuSeconds(config.getoption("--cpu")))


class CpuSeconds:
    """Notes what each test cost. With xdist the workers note it, and the controller adds it up."""

    def __init__(self, dearest: int) -> None:
        self.dearest = dearest
        self.cost: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        item.stash[SINCE] = used()
        return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = used()
        report.user_properties.append(("CPU seconds", now - item.stash[SINCE]))
        item.stash[SINCE] = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        spent = [seconds for name, seconds in report.user_properties if name == "CPU seconds"]
        self.cost[report.nodeid] += spent[-1]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        folders: Counter[str] = Counter()
        for test, seconds in self.cost.items():
            folders[str(Path(test.partition("::")[0]).parent)] += seconds
        write = terminalreporter.write_line
        terminalreporter.section("CPU seconds")
        for name, seconds in [*self.cost.most_common(self.dearest), *folders.most_common()]:
            write(f"{seconds:8.2f}  {name}")
        write(f"{used():8.2f}  everything, with what importing and collecting cost")
