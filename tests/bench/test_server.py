from __future__ import annotations

import io

import pytest

from bench import server
from bench.server import started

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
    monkeypatch.setattr(server, "PROGRAM", program)
    with started(["--model", "tiny"]) as found:
        assert found.address == "127.0.0.1:4242"
        assert found.metrics_url.startswith("http://127.0.0.1:")
        assert found.ready_seconds > 0
    said = capfd.readouterr().err
    assert said.startswith("a table first\ntaper-serve ready")
    assert "--port 0" in said
    assert "--model tiny" in said
    assert said.endswith("stopped\n")


def test_a_server_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PROGRAM", "print('a table'); raise SystemExit('no such model')")
    log = io.StringIO()
    with pytest.raises(ChildProcessError, match="did not start: it ended with 1"), started([], log):
        pass
    assert log.getvalue() == "a table\n"
