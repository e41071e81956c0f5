"""The folder that keeps compiled programs between starts, and what is done where it does not work.

Nothing that is wrong with it keeps a server from starting: it compiles anew, and says so in a line.
"""

from __future__ import annotations

import glob
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import structlog

log = structlog.get_logger("taper")

# What JAX says where it cannot use an entry; it goes on without.
_TROUBLE = re.compile(
    r"Error (?P<how>reading|writing) persistent compilation cache entry for '(?P<program>.*?)': (?P<why>.*)",
    re.DOTALL,
)


def keep_compiled_programs(folder: str | None) -> Path | None:
    """Let JAX keep programs of every size in `folder`; where it is, or None if it cannot be one."""
    if folder is None:
        return None
    try:
        path = Path(folder).expanduser()  # RuntimeError: nobody knows the home
        path.mkdir(parents=True, exist_ok=True)
        next(path.iterdir(), None)  # it can be read
    except (OSError, RuntimeError, ValueError) as error:
        log.warning("compiled programs are not kept", folder=folder, error=str(error))
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # XLA's own files beside them would have to be written: without room, compiling fails.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache entry")
    trouble = _Trouble(path, warnings.showwarning)
    warnings.showwarning = trouble.show
    if (error := _write_error(path)) is not None:
        trouble.say("writing", error)
    return path


def _write_error(folder: Path) -> str | None:
    """Why nothing can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"-" * 4096)
            file.flush()
    except OSError as error:
        return str(error)
    return None


class _Trouble:
    """Hears JAX's warnings of its cache: an entry that cannot be read goes, so that it is written anew."""

    def __init__(self, folder: Path, others: Callable[..., Any]) -> None:
        self._folder, self._others = folder, others
        self._said: set[str] = set()

    def show(self, message: Warning | str, *more: Any, **named: Any) -> None:
        found = _TROUBLE.match(str(message))
        if found is None:
            self._others(message, *more, **named)
            return
        if found["how"] == "reading":
            for entry in self._folder.glob(f"{glob.escape(found['program'])}-*"):
                try:
                    entry.unlink()
                except OSError as error:
                    self.say("writing", str(error))
        self.say(found["how"], " ".join(found["why"].split()))

    def say(self, how: str, error: str) -> None:
        """Once for all entries: what is wrong with one is wrong with most."""
        if how not in self._said:
            self._said.add(how)
            told = {
                "reading": "a compiled program that was kept cannot be read, and is compiled anew",
                "writing": "what is compiled now is not kept",
            }
            log.warning(told[how], folder=str(self._folder), error=error)
