from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.device import checkpoint
from bench.device.checkpoint import drop_from_cache, main, read_plainly
from model.checkpoint import load_model
from model.decoder import Decoder

pytestmark = pytest.mark.usefixtures("quick_compiler")


def test_a_tiny_checkpoint_is_written_restored_and_removed(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.json"
    folder = tmp_path / "folder"
    result = main(["--scale", "tiny", "--folder", str(folder), "--json", str(out)])
    assert json.loads(out.read_text()) == result
    assert result["same"]
    assert result["compared_arrays"] > 10
    assert min(result[f"{name}_gb_s"] for name in ("write", "restore_cold", "restore_warm")) > 0
    assert list(folder.iterdir()) == []


def test_weights_that_come_back_changed_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*arguments: Any) -> Decoder:
        model = load_model(*arguments)
        model.final_norm.scale.set_value(model.final_norm.scale[...] + 1)
        return model

    monkeypatch.setattr(checkpoint, "load_model", changed)
    assert not main(["--scale", "tiny", "--folder", str(tmp_path)])["same"]


def test_plain_reads_take_every_byte_and_dropping_leaves_the_files(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(checkpoint.BLOCK + 5)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(data)
    read_plainly(tmp_path, 2)
    left = drop_from_cache(tmp_path)
    assert left is None or 0 <= left <= 1
    assert (tmp_path / "inner" / "file").read_bytes() == data
