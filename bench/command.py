"""The command line of a benchmark: `python -m bench.PART.NAME`, as typed, and what each of them takes."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any


class Command(argparse.ArgumentParser):
    """The arguments of a benchmark, of which `--json` is every one's."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(prog=f"python -m {module}", description=description)
        self.add_argument("--json", help="where the result goes: a file, or - for standard output")

    def add_tensor_parallel(self) -> None:
        """For those that place a model by themselves; a server takes the option after "--"."""
        self.add_argument("--tensor-parallel", type=int, default=1, help="devices that share the model")
        self.add_argument(
            "--peer-memory",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="two GPUs that reach each other's memory add up through it",
        )

    def add_window(self, *, warmup: float, window: float, cooldown: float, drain: float) -> None:
        """For those that measure the requests of a window."""
        add = self.add_argument
        add("--warmup", type=float, default=warmup, help="seconds before the window")
        add("--window", type=float, default=window, help="seconds in which requests count")
        add("--cooldown", type=float, default=cooldown, help="seconds of arrivals after it")
        add("--drain", type=float, default=drain, help="seconds after the window that its requests get")

    def typed(self, arguments: Sequence[str]) -> str:
        """The line that runs it with these arguments, as a shell takes it."""
        return shlex.join([*self.prog.split(), *arguments])


def asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as a result keeps it: all but where that goes."""
    return {name: value for name, value in vars(options).items() if name != "json"}


def floats(text: str) -> list[float]:
    """Of `1,2.5`."""
    return [float(part) for part in text.split(",")]


def ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    return text.split(",")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What comes before "--", and what comes after: of a benchmark that starts a server, taper-serve's."""
    cut = [*arguments, "--"].index("--")
    return [*arguments[:cut]], [*arguments[cut + 1 :]]
