"""What the tests cost in CPU seconds, which depend less than other seconds on what else runs: `pytest --cpu`.

Of each test all threads of its process are counted, and the processes that it waited for. The first test to
ask for a shared fixture is charged with it.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

SINCE = pytest.StashKey[float]()

# The same work is charged with more seconds where others share the machine: two hyperthreads share a core,
# and neighbours its caches and its memory. Beside one or two busy processes we saw 1.3 to 1.6 times as many,
# and the host of a virtual machine has neighbours that nobody sees. So the bound is what a test may take on a
# quiet machine, a test above it is marked, and one fails the run only where no neighbour excuses it: a test
# whose work has grown by this factor fails it everywhere.
SHARED_CORES = 3.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu",
        type=int,
        metavar="N",
        help="print CPU seconds: of the N dearest tests, each folder, everything",
    )
    parser.addoption(
        "--cpu-bound",
        type=float,
        metavar="SECONDS",
        help=f"with --cpu: mark tests that took more, and fail if one took {SHARED_CORES:g} times as many",
    )


def used() -> float:
    """Seconds of this process and of those that it waited for; `os.times` rounds them to hundredths."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent)


def pytest_configure(config: pytest.Config) -> None:
    dearest, bound = config.getoption("--cpu"), config.getoption("--cpu-bound")
    if dearest is not None:
        config.pluginmanager.register(CpuSeconds(dearest, float("inf") if bound is None else bound))
    elif bound is not None:
        raise pytest.UsageError("--cpu-bound is a bound of what --cpu counts: give both")


class CpuSeconds:
    """Notes what each test cost. With xdist the workers note it, and the controller adds it up."""

    def __init__(self, dearest: int, bound: float) -> None:
        self.dearest = dearest
        self.bound = bound
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

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run that would have passed fails for its dearest test."""
        passed = session.exitstatus == pytest.ExitCode.OK
        if passed and max(self.cost.values(), default=0.0) > SHARED_CORES * self.bound:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        folders: Counter[str] = Counter()
        for test, seconds in self.cost.items():
            folders[str(Path(test.partition("::")[0]).parent)] += seconds
        write = terminalreporter.write_line
        terminalreporter.section("CPU seconds")
        for test, seconds in self.cost.most_common(self.dearest):
            write(f"{seconds:8.2f}  {test}{self.verdict(seconds)}")
        for folder, seconds in folders.most_common():
            write(f"{seconds:8.2f}  {folder}")
        write(f"{used():8.2f}  everything, with what importing and collecting cost")

    def verdict(self, seconds: float) -> str:
        """What a test's cost means for the run."""
        if seconds > SHARED_CORES * self.bound:
            return f"  FAILS THE RUN: more than {SHARED_CORES:g} times {self.bound:g}"
        return f"  above {self.bound:g}" if seconds > self.bound else ""
