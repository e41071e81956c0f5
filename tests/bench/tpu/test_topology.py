from __future__ import annotations

import pytest

from bench.tpu import topology


def test_who_has_no_libtpu_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "installed", lambda: False)
    with pytest.raises(topology.TopologyError, match=r"pip install -e '\.\[tpu\]'"):
        topology.devices("v5e:2x4")
