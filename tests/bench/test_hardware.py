from __future__ import annotations

import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import pytest

from bench import hardware
from tests.model.meshes import divisible


def test_a_driver_is_named_once_however_many_devices_it_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi prints a line for each."""
    lines = SimpleNamespace(stdout="580.159.04\n580.159.04\n")
    monkeypatch.setattr(hardware.subprocess, "run", lambda *_, **__: lines)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu", device_kind="a card")] * 2)
    described = hardware.describe(2)
    assert described["versions"]["driver"] == "580.159.04"
    assert (described["hardware"]["device"], described["hardware"]["devices"]) == ("a card", 2)


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_of_two_devices_reaches_the_placement(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    between = MagicMock(return_value=None)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # which it adds to
    monkeypatch.setattr("model.sharding.PeerMemory.between", between)
    assert hardware.placement(divisible(2), 2, peer_memory=asked).count == 2
    assert between.called == asked
