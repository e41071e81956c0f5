"""TensorFiles: the safetensors of a Hugging Face folder, and which of them holds a tensor.

The index decides, where there is one; else `model.safetensors` is the checkpoint, whatever lies beside it. An
index that does not fit the files is an error: half of an old checkpoint and half of a new one would load.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from model.settings import CheckpointError, check_file, listed, one_line, present, read_object, shown

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class WeightsError(CheckpointError):
    """The tensors on disk are not the tensors of the model. One line, with the first of the faults."""


class Stored(NamedTuple):
    """A tensor as it is stored: its shape, its type as NumPy or else safetensors calls it, and its file."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class TensorFiles:
    """The open files of a folder, to be used in a `with` statement.

    Raises WeightsError, naming the files, where they cannot be read or contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._files: dict[str, Any] = {}
        self._holder: dict[str, str] = {}

    def __enter__(self) -> TensorFiles:
        with self._stack:  # closes what is open if anything fails
            index = _weight_map(self._folder)
            for file in sorted(set(index.values())) if index is not None else [WHOLE]:
                self._files[file] = self._open(file)
            self._holder = {name: file for file, open_ in self._files.items() for name in open_.keys()}  # noqa: SIM118
            if index is not None:
                self._check(index)
                self._holder |= index
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._holder

    def stored(self) -> dict[str, Stored]:
        """Every tensor by its name."""
        return {name: self._describe(name) for name in self._holder}

    def read(self, name: str) -> np.ndarray:
        return self._files[self._holder[name]].get_tensor(name)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors of floats hold the same numbers; they are read in parts."""
        a, b = self._describe(one), self._describe(other)
        if a.shape != b.shape or not a.shape or not {a.dtype, b.dtype} <= set(FLOATS.values()):
            return False
        parts = self._slice(one), self._slice(other)
        rows = [(row, min(row + _ROWS, a.shape[0])) for row in range(0, a.shape[0], _ROWS)]
        return all(np.array_equal(*(part[begin:end] for part in parts)) for begin, end in rows)

    def _open(self, file: str) -> Any:
        try:
            check_file(self._folder / file)
            return self._stack.enter_context(safe_open(self._folder / file, "np"))
        except CheckpointError as error:
            raise WeightsError(str(error)) from error
        except Exception as error:  # the library has an exception of its own, and raises others, too
            raise WeightsError(f"cannot read {self._folder / file}: {one_line(error)}") from error

    def _slice(self, name: str) -> Any:
        return self._files[self._holder[name]].get_slice(name)

    def _describe(self, name: str) -> Stored:
        part = self._slice(name)
        kind = str(part.get_dtype())
        return Stored(tuple(part.get_shape()), FLOATS.get(kind, kind), self._holder[name])

    def _check(self, index: Mapping[str, str]) -> None:
        """Refuses an index that names what its files do not hold, or does not name what they hold."""
        faults = []
        for name, file in index.items():
            if name not in self._files[file].keys():  # noqa: SIM118 (not a dict)
                elsewhere = self._holder.get(name)
                where = f" (but {shown(elsewhere)} does)" if elsewhere else ""
                faults.append(f"it says that {shown(file)} holds {shown(name)}, which it does not{where}")
        for name, file in self._holder.items():
            if name not in index and not ignored(name):
                faults.append(f"it does not name {shown(name)}, which {shown(file)} holds")
        if faults:
            raise WeightsError(f"{self._folder / INDEX} is stale: {listed(faults)}")


_ROWS = 4096  # of a tensor that are compared at once


def ignored(name: str) -> bool:
    """Tables that old checkpoints carry: they follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file holds each tensor, by the index; None where `model.safetensors` is the checkpoint."""
    path, whole = folder / INDEX, folder / WHOLE
    if not present(path):
        if not present(whole):
            raise WeightsError(f"no {WHOLE} and no {INDEX} in {folder}{_instead(folder)}")
        return None
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path}: weight_map: expected tensors and their files, found {shown(weight_map)}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise WeightsError(
                f"{path}: {shown(name)}: expected the name of a file in the folder, found {shown(file)}"
            )
    files = sorted(set(weight_map.values()))
    absent = [shown(file) for file in files if not _exists(folder / file)]
    if absent:
        beside = f", while {WHOLE} lies beside it" if present(whole) else ""
        raise WeightsError(f"{path} names files that are not there{beside}: {listed(absent)}")
    if present(whole) and WHOLE not in files:
        raise WeightsError(f"{path} names other files than {whole}, which is there, too: remove one of them")
    return weight_map


def _exists(path: Path) -> bool:
    try:
        return present(path)
    except OSError:  # a name that no file can have
        return False


def _is_plain(file: str) -> bool:
    """Whether this names a file in the folder itself: nothing in a checkpoint leads out of it."""
    return file not in ("", ".", "..") and not any(sign in file for sign in ("/", "\\", "\0"))


def _instead(folder: Path) -> str:
    kinds = ("*.safetensors", "*.bin", "*.gguf")
    others = sorted(shown(file.name) for kind in kinds for file in folder.glob(kind))
    return f" (there is {listed(others, 3)})" if others else ""
