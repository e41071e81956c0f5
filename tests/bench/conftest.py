"""What the benchmarks run on in tests: a model and a copy as small as can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import model.tiny
from bench import hardware


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth that results quote is measured on a megabyte."""
    measure = hardware.copy_tb_s
    monkeypatch.setattr(hardware, "copy_tb_s", lambda *_, **__: measure(2**20))


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model with the default model's tokenizer: its programs take little time to compile."""
    from tests.model.checkpoints import CHECKPOINTS

    default, folder = Path(model.tiny.__file__).parent, tmp_path_factory.mktemp("one-layer")
    small = CHECKPOINTS["qwen3-gqa1-tied"]
    config = replace(small.config, name="one-layer", num_layers=1, vocab_size=269, max_context=2048)
    replace(small, config=config).write(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((default / name).read_bytes())
    return str(folder)
