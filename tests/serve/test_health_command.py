"""What asks a server whether it serves, by its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.health_command import main
from serve.server.tls import Certificates
from tests.serve.authorities import Authority
from tests.serve.fakes import FakeEngine, listening


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """The exit code, or what is said on leaving with 1; and the last line that is printed, if it is not."""
    capsys.readouterr()
    try:
        main(arguments)
    except SystemExit as left:
        return left.code, ""
    return 0, capsys.readouterr().out.splitlines()[-1]


def test_a_server_that_serves_is_healthy_and_one_that_drains_is_not(capsys) -> None:
    engine = FakeEngine()
    with listening(engine) as address:
        assert said(capsys, "--address", address) == (0, "SERVING")
        assert said(capsys, "--address", address, "--service", "taper.v1.InferenceService")[0] == 0
        assert said(capsys, "--address", address, "--service", "other")[0] == (
            f"taper-health: {address}: NOT_FOUND: no service 'other'"
        )
        engine.state = "DRAINING"
        assert said(capsys, "--address", address) == (f"taper-health: {address}: NOT_SERVING", "")
    why, _ = said(capsys, "--address", address, "--timeout", "2")
    assert str(why).startswith(f"taper-health: {address}: UNAVAILABLE")


def test_with_certificates_it_needs_them(capsys, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key, authorities = map(str, authority.issue("client"))
    with listening(FakeEngine(), certificates=Certificates(authority.issue())) as address:
        known = ("--address", address, "--tls-ca-cert-path", authorities)
        own = ("--tls-cert-path", cert, "--tls-key-path", key)
        assert said(capsys, *known, *own) == (0, "SERVING")
        other = said(capsys, *known, *own, "--tls-server-name", "other.example")[0]
        assert "Hostname Verification Check failed" in str(other)
        for missing in (known, ("--address", address)):
            assert "UNAVAILABLE" in str(said(capsys, *missing, "--timeout", "2")[0])
    absent = said(capsys, "--tls-ca-cert-path", "absent.pem")[0]
    assert absent == "taper-health: cannot read absent.pem: No such file or directory"


def test_a_flag_that_is_none_is_said(capsys) -> None:
    assert said(capsys, "--adress", "localhost:1")[0] == 2
