"""Pictures of what a terminal shows, for the docs."""

from __future__ import annotations

import re
from html import unescape

from rich.console import Console
from rich.terminal_theme import MONOKAI

CHARACTER = 12.2  # its width in such a picture


def svg(console: Console, command: str) -> str:
    """What a console has recorded, under the command that was typed. It fetches nothing, not even a font."""
    drawn = console.export_svg(title=command, theme=MONOKAI, unique_id="screen", clear=False)
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    return drawn.replace("Fira Code, monospace", "monospace")


def lines(picture: str) -> list[str]:
    """The text of such a picture, from top to bottom."""
    pieces = re.findall(r'<text class="screen-r\d+" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', picture)
    rows: dict[float, str] = {}
    for x, y, text in pieces:
        before = rows.get(float(y), "").ljust(round(float(x) / CHARACTER))
        rows[float(y)] = before + unescape(text).replace("\xa0", " ")
    return [row.rstrip() for _, row in sorted(rows.items())]
