"""Which pages are made, and by what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from docs.make import client, files, request, stale, wire

ROOT = Path(__file__).parents[2]


def pages() -> dict[Path, str]:
    """The text of each page, or of each page with parts that are made, by where it belongs."""
    docs = ROOT / "docs"
    life, claims = docs / "life-of-a-request.md", docs / "claims/README.md"
    return {
        docs / "reference/grpc.md": wire.page(wire.described(ROOT / "serve/client/protos")),
        docs / "reference/python.md": client.page(ROOT / "serve/client/taper_client"),
        docs / "files.md": files.page(ROOT),
        life: filled(life.read_text(), request.printed()),
        claims: filled(claims.read_text(), {"table": stale.table(stale.pages(), stale.claimed())}),
    }


def filled(page: str, parts: Mapping[str, str]) -> str:
    """A page with each part between its marks. Raises ValueError unless each has its marks, once."""
    for name, text in parts.items():
        pieces = re.split(rf"(<!-- made: {name} -->\n).*?(\n<!-- end -->)", page, flags=re.DOTALL)
        if len(pieces) != 4:
            raise ValueError(f"the part {name!r} does not have its marks once")
        before, begin, end, after = pieces
        page = before + begin + text + end + after
    return page
