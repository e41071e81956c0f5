"""Which pages are made, and by what."""

from __future__ import annotations

from pathlib import Path

from docs.make import client, wire

ROOT = Path(__file__).parents[2]


def pages() -> dict[Path, str]:
    """The text of each page, by where it belongs."""
    reference = ROOT / "docs/reference"
    protos = ROOT / "serve/client/protos"
    return {
        reference / "grpc.md": wire.page(wire.described(protos)),
        reference / "python.md": client.page(ROOT / "serve/client/taper_client"),
    }
