"""What is typed after `taper-serve`: a ServerConfig, or one line that says why there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, NoReturn

import tyro

from model.version import versions
from serve.config import GROUPS, OptionError, ServerConfig
from serve.config.file import ConfigFileError, read
from serve.config.help import shown

PROG = "taper-serve"
WRONG = 2  # exit status for a wrong option, as tyro's own

EXAMPLES = """
examples:
  The embedded tiny model, for this machine alone:
    taper-serve
  A model folder, for others too, with metrics:
    taper-serve --model PATH/TO/Qwen3-0.6B --host 0.0.0.0 --metrics-port 9090
  How the memory of a GPU would be divided:
    taper-serve --model qwen3-32b --load-format random --explain
  Options from a file, and one of them from here:
    taper-serve --config server.toml --port 50052
"""


@dataclass(frozen=True, kw_only=True)
class _About:
    """What is asked beside the options of the server."""

    config: str | None = None
    """TOML file of options, by the names below: `max-queue = 64`. What is typed here counts before it."""
    version: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say the versions of taper, JAX and Python, and leave."""


# Each group is one of --help. What they hold is checked when all of it is together, in a ServerConfig.
_SHOWN = {name: shown(group) for name, group in GROUPS.items()}
_Typed = make_dataclass(
    "_Typed",
    [(name, group, field(default_factory=group)) for name, group in _SHOWN.items()],
    bases=(_About,),
    frozen=True,
    kw_only=True,
)


def configured(args: Sequence[str] | None = None) -> ServerConfig:
    """What these arguments ask for, or those of this process, and the file that they name.

    Leaves with status 2 if they cannot work.
    """
    given = sys.argv[1:] if args is None else args
    with _left_when_nobody_reads():
        typed = _parsed(given, {})
        if typed.version:
            print(versions(), flush=True)
            sys.exit(0)
    if typed.config is None:
        return _checked(_values(typed), {}, "")
    try:
        filed = read(Path(typed.config))
    except ConfigFileError as error:
        _leave(str(error))
    return _checked(_values(_parsed(given, filed)), filed, typed.config)


def _parsed(args: Sequence[str], defaults: Mapping[str, Any]) -> Any:
    """A _Typed. Options that are not among the arguments are as in `defaults`, or their own."""
    chosen = {
        name: group(
            **{option.name: defaults[option.name] for option in fields(group) if option.name in defaults}
        )
        for name, group in _SHOWN.items()
    }
    try:
        return tyro.cli(
            _Typed,
            prog=PROG,
            description="Serve a model over gRPC until SIGTERM.",
            args=args,
            default=_Typed(**chosen),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as left:
        if not left.code and {"-h", "--help"} & {*args}:
            print(EXAMPLES, flush=True)
        raise


def _values(typed: Any) -> dict[str, Any]:
    """Of every option, by its name."""
    told = (getattr(typed, name) for name in GROUPS)
    return {option.name: getattr(group, option.name) for group in told for option in fields(group)}


def _checked(values: Mapping[str, Any], filed: Mapping[str, Any], file: str) -> ServerConfig:
    """`filed` are the options that `file` gives: what is wrong with one of them names it."""
    try:
        return ServerConfig(**values)
    except OptionError as error:
        in_file = any(option in filed and values[option] in (filed[option],) for option in error.options)
        _leave(f"{file}: {error}" if in_file else str(error))


@contextmanager
def _left_when_nobody_reads() -> Iterator[None]:
    """As in `taper-serve --help | head`: the interpreter would complain that it cannot write the rest."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _leave(why: str) -> NoReturn:
    print(f"{PROG}: {why}", file=sys.stderr)
    sys.exit(WRONG)
