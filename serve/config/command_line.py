"""What is typed after `taper-serve`: a ServerConfig, or one line that says why there is none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any

import tyro

from serve.config import GROUPS, OptionError, ServerConfig

PROG = "taper-serve"
WRONG = 2  # exit status for a wrong option, as tyro's own

# A group of --help each. They are checked when they are put together.
_Options = make_dataclass(
    "_Options",
    [(name, group, field(default_factory=group)) for name, group in GROUPS.items()],
    frozen=True,
    kw_only=True,
)


def configured(args: Sequence[str] | None = None) -> ServerConfig:
    """What these arguments ask for, or those of this process. Leaves with status 2 if they cannot work."""
    typed: Any = tyro.cli(
        _Options,
        prog=PROG,
        description="Serve a model over gRPC until SIGTERM.",
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    try:
        return ServerConfig(**_values(typed))
    except OptionError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        sys.exit(WRONG)


def _values(typed: Any) -> dict[str, Any]:
    """Of every option, by its name."""
    groups = (getattr(typed, name) for name in GROUPS)
    return {option.name: getattr(group, option.name) for group in groups for option in fields(group)}
