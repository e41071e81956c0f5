"""The reference of the protos: every service, message and enumeration, with its comment."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

INTRODUCTION = """\
# The messages on the wire

This page is for somebody who calls a server by gRPC from any language, or wants to know what a field means. \
It is made from the [protos](../../serve/client/protos/taper/v1) by `make pages`. A server also describes \
itself by reflection. [python.md](python.md) is the same for the Python client, and \
[troubleshooting.md](../troubleshooting.md) lists the reasons for which a server refuses a call.

A field whose type says *optional* can be unset, which differs from zero. Of the fields under *one of*, a \
message has one at most.
"""

# Numbers of descriptor.proto's fields, of which the path to a comment is made.
_FILE_MESSAGES, _FILE_ENUMS, _FILE_SERVICES, _FILE_SYNTAX = 4, 5, 6, 12
_FIELDS, _ONE_OFS, _VALUES, _METHODS = 2, 8, 2, 2

Field = FieldDescriptorProto
_Path = tuple[int, ...]


def described(protos: Path) -> list[FileDescriptorProto]:
    """What protoc says of the protos in a folder, comments included; those that others need come first."""
    from grpc_tools import protoc

    files = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "protos"
        options = ["--include_source_info", f"--descriptor_set_out={target}"]
        if protoc.main(["protoc", f"-I{protos}", f"-I{well_known}", *options, *files]):
            raise RuntimeError("protoc failed; what it printed says why")
        found = FileDescriptorSet.FromString(target.read_bytes()).file
    return sorted(found, key=lambda file: len(file.dependency))


def page(files: Iterable[FileDescriptorProto]) -> str:
    """Raises KeyError, with its path, for anything that has no comment."""
    parts = [INTRODUCTION]
    for file in files:
        comments = _Comments(file)
        parts.append(f"## {file.name.rpartition('/')[2]}\n\n{comments[(_FILE_SYNTAX,)]}\n")
        for index, service in enumerate(file.service):
            parts.append(_service(service, comments, (_FILE_SERVICES, index)))
        # In the order of the file, in which an enumeration stands beside the messages that have it.
        described = [
            (comments.line((_FILE_MESSAGES, i)), i, each) for i, each in enumerate(file.message_type)
        ]
        described += [(comments.line((_FILE_ENUMS, i)), i, each) for i, each in enumerate(file.enum_type)]
        for _, index, each in sorted(described, key=lambda one: one[0]):
            if isinstance(each, DescriptorProto):
                parts.append(_message(each, comments, (_FILE_MESSAGES, index)))
            else:
                parts.append(_enumeration(each, comments, (_FILE_ENUMS, index)))
    return "\n".join(parts)


class _Comments:
    """What stands above each thing in a file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._of: dict[_Path, str] = {}
        self._line: dict[_Path, int] = {}
        for location in file.source_code_info.location:
            path = tuple(location.path)
            self._line.setdefault(path, location.span[0])
            if location.leading_comments:
                self._of[path] = " ".join(location.leading_comments.split()).replace("|", "\\|")

    def __getitem__(self, path: _Path) -> str:
        return self._of[path]

    def line(self, path: _Path) -> int:
        return self._line[path]


def _service(service: ServiceDescriptorProto, comments: _Comments, path: _Path) -> str:
    rows = []
    for index, method in enumerate(service.method):
        answer = ("a stream of " if method.server_streaming else "") + _link(method.output_type)
        about = comments[(*path, _METHODS, index)]
        rows.append(f"| `{method.name}` | {_link(method.input_type)} | {answer} | {about} |")
    return _section(
        service.name, comments[path], "| method | takes | answers | meaning |\n|---|---|---|---|", rows
    )


def _message(message: DescriptorProto, comments: _Comments, path: _Path) -> str:
    entries = {each.name: each for each in message.nested_type if each.options.map_entry}
    rows = []
    group = None
    for index, field in enumerate(message.field):
        own = field.oneof_index if field.HasField("oneof_index") and not field.proto3_optional else None
        if own is not None and own != group:
            name, about = message.oneof_decl[own].name, comments[(*path, _ONE_OFS, own)]
            rows.append(f"| *one of `{name}`* | | {about} |")
        group = own
        indent = "" if own is None else "&nbsp;&nbsp;"
        about = comments[(*path, _FIELDS, index)]
        rows.append(f"| {indent}`{field.name}` | {_type(field, entries)} | {about} |")
    return _section(message.name, comments[path], "| field | type | meaning |\n|---|---|---|", rows)


def _enumeration(enumeration: EnumDescriptorProto, comments: _Comments, path: _Path) -> str:
    rows = [
        f"| `{value.name}` | {value.number} | {comments[(*path, _VALUES, index)]} |"
        for index, value in enumerate(enumeration.value)
    ]
    return _section(enumeration.name, comments[path], "| value | number | meaning |\n|---|---|---|", rows)


def _section(name: str, about: str, head: str, rows: list[str]) -> str:
    table = "\n".join([head, *rows]) + "\n" if rows else ""
    return f"### {name}\n\n{about}\n" + (f"\n{table}" if table else "")


def _type(field: Field, entries: dict[str, DescriptorProto]) -> str:
    entry = entries.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = (_type(each, {}) for each in entry.field)
        return f"map from {key} to {value}"
    kind = Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    named = _link(field.type_name) if field.type_name else kind
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {named}"
    return f"optional {named}" if field.proto3_optional else named


def _link(name: str) -> str:
    """Of a message or an enumeration: where this page, or protobuf's own, describes it."""
    package, _, short = name.rpartition(".")
    if package == ".google.protobuf":
        return f"[{short}](https://protobuf.dev/reference/protobuf/google.protobuf/#{short.lower()})"
    return f"[{short}](#{short.lower()})"
