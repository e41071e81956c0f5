"""A small model folder that a test can damage: of every kind of file, one that is right."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import model.tiny
from model.tensor_files import INDEX, WHOLE
from tests.model.checkpoints import CHECKPOINTS, Checkpoint

TINY = Path(model.tiny.__file__).parent
RECIPE = Checkpoint(
    config=replace(
        CHECKPOINTS["qwen3-gqa1-tied"].config, vocab_size=280, num_layers=1, hidden_size=16, head_dim=8
    )
)
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class Folder:
    """A model folder, and ways to change its files."""

    path: Path

    @classmethod
    def make(cls, path: Path) -> Folder:
        RECIPE.write(path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(TINY / name, path)
        return cls(path)

    def write(self, name: str, content: Any) -> None:
        """Bytes as they are, text as UTF-8, anything else as JSON."""
        data = content if isinstance(content, bytes) else None
        text = content if isinstance(content, str) else json.dumps(content) if data is None else ""
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_bytes(text.encode() if data is None else data)

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def edit(self, name: str, *without: str, **changes: Any) -> None:
        """Changes keys of a JSON object, and takes some away."""
        content = self.read(name) | changes
        self.write(name, {key: value for key, value in content.items() if key not in without})

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def becomes_a_folder(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        (self.path / name).mkdir()

    def links_to_nothing(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        (self.path / name).symlink_to("gone")

    def cut(self, name: str, size: int) -> None:
        self.write(name, (self.path / name).read_bytes()[:size])

    def tensors(self) -> dict[str, np.ndarray]:
        return load_file(self.path / WHOLE)

    def store(self, tensors: dict[str, np.ndarray], file: str = WHOLE) -> None:
        save_file(tensors, self.path / file)

    def store_raw(self, name: str, kind: str, shape: list[int], size: int) -> None:
        """Puts a tensor of a type that NumPy does not know in the place of one."""
        tensors = self.tensors()
        tensors.pop(name, None)
        header, data = {}, b""
        for key, tensor in [*tensors.items(), (name, None)]:
            raw = bytes(size) if tensor is None else tensor.tobytes()
            header[key] = {
                "dtype": kind if tensor is None else "F32",
                "shape": shape if tensor is None else list(tensor.shape),
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
        text = json.dumps(header).encode()
        self.write(WHOLE, len(text).to_bytes(8, "little") + text + data)

    def shard(self) -> dict[str, str]:
        """The weights in two files, embedding and last norm in the first; returns which holds which."""
        tensors = self.tensors()
        files = {name: "a.safetensors" if name in (EMBEDDING, NORM) else "b.safetensors" for name in tensors}
        for file in set(files.values()):
            self.store({name: tensors[name] for name in tensors if files[name] == file}, file)
        self.remove(WHOLE)
        self.write(INDEX, {"metadata": {}, "weight_map": files})
        return files
