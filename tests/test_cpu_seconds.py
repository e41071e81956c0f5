"""A test that costs too much fails the run, also where every test passes."""

from __future__ import annotations

import pytest

from tests import cpu_seconds

pytest_plugins = ["pytester"]

# Each spends a known time: cheap next to nothing, dear at least half a second.
TESTS = """
import time

def test_cheap():
    pass

def test_dear():
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
"""


def run(pytester: pytest.Pytester, *options: str) -> tuple[pytest.ExitCode | int, str]:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("-p", "tests.cpu_seconds", *options)
    result.assert_outcomes(passed=2)
    return result.ret, result.stdout.str()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_one_dear_test_fails_a_run_in_which_all_pass(pytester: pytest.Pytester, workers: str) -> None:
    code, said = run(pytester, "-n", workers, "--cpu", "2", "--cpu-bound", "0.1")
    assert code == pytest.ExitCode.TESTS_FAILED
    (line,) = (line for line in said.splitlines() if "::test_dear" in line and "FAILS THE RUN" in line)
    assert float(line.split()[0]) >= 0.5


def test_a_test_within_the_head_room_is_marked_and_fails_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so much head room that a busy machine makes no difference."""
    monkeypatch.setattr(cpu_seconds, "SHARED_CORES", 1000)
    code, said = run(pytester, "-n", "0", "--cpu", "2", "--cpu-bound", "0.3")
    assert code == pytest.ExitCode.OK
    assert any("::test_dear" in line and "above 0.3" in line for line in said.splitlines())


def test_without_a_bound_costs_are_printed_and_fail_nothing(pytester: pytest.Pytester) -> None:
    code, said = run(pytester, "-n", "0", "--cpu", "2")
    assert code == pytest.ExitCode.OK
    assert "::test_dear" in said
    assert "FAILS" not in said


def test_a_bound_of_nothing_that_is_counted_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("-p", "tests.cpu_seconds", "--cpu-bound", "1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
