"""Where rows are cut into tiles is looked for only where there is something to find."""

from __future__ import annotations

import pytest

from attention import tile_cuts
from tests.attention.test_tiles import groups, plan, tiling


def test_where_nothing_is_shared_no_cuts_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_cuts, "_pack", lambda *_: pytest.fail("there is nothing to pack"))
    assert plan(groups(5, 1, prefix=0, tail=1000), tiling(workers=1)).num_tiles == 5
