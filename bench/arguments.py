"""The command line of a benchmark that starts a server: its own arguments, then "--", then taper-serve's."""

from __future__ import annotations

from collections.abc import Sequence


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What comes before "--", and what comes after."""
    cut = [*arguments, "--"].index("--")
    return [*arguments[:cut]], [*arguments[cut + 1 :]]
