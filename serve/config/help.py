"""What --help says of each option: the text below its field, in one line, with flags as they are typed.

tyro would end lines where the source does.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, get_type_hints

import tyro

from serve.config import ServerConfig, flag, groups

_OPTIONS = {option.name for option in fields(ServerConfig)}


def shown(group: type[groups.Group]) -> type[Any]:
    """A dataclass of the same fields, for tyro to show."""
    hints, texts = get_type_hints(group, include_extras=True), _texts()
    options = [
        (name, Annotated[hints[name], tyro.conf.arg(help=texts.get(name))], field(default=option.default))
        for option in fields(group)
        for name in [option.name]
    ]
    named = {"__doc__": group.__doc__}
    return make_dataclass(group.__name__, options, namespace=named, frozen=True, kw_only=True)


@cache
def _texts() -> dict[str, str]:
    """Of each option. None of them where the source is not at hand: tyro looks for it, too."""
    try:
        module = ast.parse(inspect.getsource(groups))
    except OSError:
        return {}
    return dict(_below(module))


def _below(module: ast.Module) -> Iterator[tuple[str, str]]:
    for group in module.body:
        for option, text in pairwise(getattr(group, "body", ())):
            match option, text:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(said))):
                    yield name, re.sub(r"`(\w+)`", _as_typed, " ".join(said.split()))


def _as_typed(quoted: re.Match[str]) -> str:
    return flag(quoted[1]) if quoted[1] in _OPTIONS else quoted[0]
