from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from bench import hardware


def test_a_driver_is_named_once_however_many_devices_it_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi prints a line for each."""
    lines = SimpleNamespace(stdout="580.159.04\n580.159.04\n")
    monkeypatch.setattr(hardware.subprocess, "run", lambda *_, **__: lines)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu", device_kind="a card")] * 2)
    described = hardware.describe(2)
    assert described["versions"]["driver"] == "580.159.04"
    assert (described["hardware"]["device"], described["hardware"]["devices"]) == ("a card", 2)
