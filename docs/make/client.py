"""The reference of the Python client: what `taper_client` exports, with signatures and docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

INTRODUCTION = """\
# The Python client

This page is for somebody who calls a server from Python and wants to know what a name takes and \
returns. It is made from the docstrings of `taper_client` by `make pages`; [client.md](../client.md) shows \
how the names are used. `pb` in a signature is `taper_client.v1.inference_service_pb2`, and `control_pb` is \
`taper_client.v1.control_service_pb2`: [grpc.md](grpc.md) has their messages. `VERSION` is the version of \
the package.
"""

# The modules in reading order, each with its heading.
SECTIONS = {
    "client": "Clients and streams",
    "request": "Prompts and requests",
    "options": "Options",
    "plan": "Plans",
    "answer": "Answers",
    "events": "Events",
    "credentials": "TLS and tokens",
    "errors": "Errors",
}
FIRST = ("Client", "AsyncClient")  # in their section, though they stand below what they return
_WIDTH = 96  # of a signature; a longer one has a line for each argument
_DESCRIBED = re.compile(
    r"(\w+) {2,}(\S.*)"
)  # "name   what it is": how docstrings describe arguments and fields

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Entry:
    """A name that a module or a class binds, with its docstring, or the string below a value."""

    name: str
    node: Definition
    about: str


def page(package: Path) -> str:
    """Raises KeyError for an exported name that no module of `SECTIONS` has, ValueError without docstring."""
    modules = {name: ast.parse((package / f"{name}.py").read_text()) for name in SECTIONS}
    entries = {entry.name: entry for module in modules.values() for entry in _entries(module.body)}
    shown = _shown(ast.parse((package / "names.py").read_text()), entries)
    parts = [INTRODUCTION]
    for name, module in modules.items():
        about = " ".join((ast.get_docstring(module) or "").partition("\n\n")[0].split())
        parts.append(f"## {SECTIONS[name]}\n\n{about}\n")
        own = [entry for entry in _entries(module.body) if entry.name in shown]
        parts += [_section(entry, entries) for entry in sorted(own, key=lambda each: each.name not in FIRST)]
    return "\n".join(parts)


# --- what is shown -----------------------------------------------------------------------------------------


def _entries(body: list[ast.stmt]) -> Iterator[Entry]:
    """What a module or a class binds, in order."""
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | Function):
            yield Entry(node.name, node, ast.get_docstring(node) or "")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                yield Entry(target.id, node, _string(following))


def _string(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


def _shown(names: ast.Module, entries: Mapping[str, Entry]) -> set[str]:
    """What is exported, and what that names in bases, signatures and fields, and so on."""
    (exported,) = (node.value for node in names.body if isinstance(node, ast.Assign))
    waiting = [str(name) for name in ast.literal_eval(exported) if name != "VERSION"]
    shown: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in shown:
            shown.add(name)
            nodes = (node for part in _read_by_users(entries[name].node) for node in ast.walk(part))
            waiting += {node.id for node in nodes if isinstance(node, ast.Name)} & entries.keys()
    return {name for name in shown if not name.startswith("_")}


def _read_by_users(node: Definition) -> Iterator[ast.AST]:
    """The parts of a definition that its users read: no bodies, and nothing private."""
    if isinstance(node, ast.ClassDef):
        yield from node.bases
        for member in _entries(node.body):
            if member.name == "__init__" or not member.name.startswith("_"):
                yield from _read_by_users(member.node)
    elif isinstance(node, Function):
        yield from [node.args, node.returns] if node.returns else [node.args]
    elif isinstance(node, ast.AnnAssign):
        yield node.annotation
    else:
        yield node.value


def _members(node: ast.ClassDef) -> list[Entry]:
    """Fields and methods. What a server, or the client itself, does with an error is not for its users."""
    kinds = ast.AnnAssign if node.name.endswith("Error") else ast.AnnAssign | Function
    own = _entries(node.body)
    return [each for each in own if isinstance(each.node, kinds) and not each.name.startswith("_")]


# --- how it is written -------------------------------------------------------------------------------------


def _section(entry: Entry, entries: Mapping[str, Entry]) -> str:
    if not entry.about:
        raise ValueError(f"{entry.name} has no docstring")
    if isinstance(entry.node, ast.ClassDef):
        parts = [*_class(entry.node, entries)]
    elif isinstance(entry.node, Function):
        about, described = _split(entry.about)
        parts = [_code(_signature(entry.name, entry.node)), about, _table(described)]
    elif isinstance(entry.node, ast.Assign):
        parts = [_code(ast.unparse(entry.node)), entry.about]
    else:
        parts = [_code(f"{entry.name}: {ast.unparse(entry.node.annotation)}"), entry.about]
    return f"### {entry.name}\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _class(node: ast.ClassDef, entries: Mapping[str, Entry]) -> Iterator[str]:
    prose, described = _split(ast.get_docstring(node) or "")
    made_by = _constructor(node, entries)
    if made_by is not None and {each.arg for each in _arguments(made_by)} <= described.keys():
        yield _code(_signature(node.name, made_by))
    yield prose
    yield _inherited(node, entries)
    types: dict[str, str] = {}
    methods: list[str] = []
    for member in _members(node):
        if isinstance(member.node, Function) and not member.node.decorator_list:
            about = _split(member.about)[0].replace("\n\n", " ")
            methods.append(f"- `{_signature(member.name, member.node, width=1000)}`: {about}")
            continue
        types[member.name] = _type(member.node)
        described[member.name] = described.pop(member.name, None) or member.about
    yield _table(described, types)
    yield "\n".join(methods)


def _type(field: Definition) -> str:
    kind = field.returns if isinstance(field, Function) else getattr(field, "annotation", None)
    return ast.unparse(kind) if kind else ""


def _inherited(node: ast.ClassDef, entries: Mapping[str, Entry]) -> str:
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in entries]
    links = [f"[{base}](#{base.lower()})" for base in bases if not base.startswith("_")]
    if not links:
        return ""
    if node.name.endswith("Error"):
        status = next(each.node for each in _entries(node.body) if each.name == "code")
        assert isinstance(status, ast.Assign)
        return f"A {links[0]} whose `code` is `{ast.unparse(status.value)}`."
    return f"With all that {' and '.join(links)} have."


def _constructor(node: ast.ClassDef, entries: Mapping[str, Entry]) -> Function | None:
    """Its own, or that of a private class that it goes on from."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return each
    for base in node.bases:
        above = entries.get(base.id) if isinstance(base, ast.Name) else None
        if above is not None and above.name.startswith("_") and isinstance(above.node, ast.ClassDef):
            return _constructor(above.node, entries)
    return None


def _arguments(function: Function) -> list[ast.arg]:
    found = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [each for each in found if each.arg != "self"]


def _signature(name: str, function: Function, width: int = _WIDTH) -> str:
    """As Python has it, without `self`; in one line if that is not wider than `width`."""
    parameters = [*_parameters(function.args)]
    returns = f" -> {ast.unparse(function.returns)}" if function.returns and name == function.name else ""
    prefix = "async " if isinstance(function, ast.AsyncFunctionDef) else ""
    line = f"{prefix}{name}({', '.join(parameters)}){returns}"
    if len(line) <= width:
        return line
    return f"{prefix}{name}(\n" + "".join(f"    {each},\n" for each in parameters) + f"){returns}"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    required = len(arguments.args) - len(arguments.defaults)
    for argument, default in zip(arguments.args, [None] * required + arguments.defaults, strict=True):
        if argument.arg != "self":
            yield _parameter(argument, default)
    if arguments.vararg:
        yield f"*{_parameter(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg:
        yield f"**{_parameter(arguments.kwarg)}"


def _parameter(argument: ast.arg, default: ast.expr | None = None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def _split(docstring: str) -> tuple[str, dict[str, str]]:
    """The prose of a docstring, and what it says of each argument or field."""
    prose: list[str] = []
    described: dict[str, str] = {}
    for paragraph in docstring.split("\n\n"):
        name = ""
        lines = paragraph.split("\n")
        if not _DESCRIBED.fullmatch(lines[0]):
            prose.append(" ".join(line.strip() for line in lines))
            continue
        for line in lines:
            if found := _DESCRIBED.fullmatch(line):
                name, described[name] = found[1], found[2]
            else:
                described[name] += f" {line.strip()}"
    return "\n\n".join(prose), described


def _table(described: Mapping[str, str], types: Mapping[str, str] | None = None) -> str:
    if not described:
        return ""
    if not types:
        rows = [f"| `{name}` | {about} |" for name, about in described.items()]
        return "\n".join(["| name | meaning |", "|---|---|", *rows])
    rows = [f"| `{name}` | {_kind(types.get(name, ''))} | {about} |" for name, about in described.items()]
    return "\n".join(["| name | type | meaning |", "|---|---|---|", *rows])


def _kind(annotation: str) -> str:
    return f"`{annotation}`".replace("|", "\\|") if annotation else ""


def _code(text: str) -> str:
    """A block, with the quotation marks that the sources have."""
    return "```python\n" + text.replace("'", '"') + "\n```"
