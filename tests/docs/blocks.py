"""The fenced blocks of all pages, and the commands in those that a reader types into a shell."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MADE = "docs/reference/"  # of the code: signatures, which a test of their own compares with it
SERVES = re.compile(r"taper-serve(?!.*--(?:explain|help|version))")
_FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ASSIGNED = re.compile(r"\w+=")
_BETWEEN = {"&", "&&", "|", ";", "||"}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    language   what follows the fence; empty for drawings, and for what a program printed
    before     the last line of prose above it
    """

    page: str
    language: str
    text: str
    before: str

    @property
    def name(self) -> str:
        """Its page and its first line."""
        return f"{self.page}: {self.text.splitlines()[0].split(' #')[0].rstrip()}"

    @property
    def lines(self) -> list[str]:
        """Of a shell: commands that go on in a next line are one."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command; assignments, comments and where the output goes left out."""
        return [command for line in self.lines for command in _commands(line)]


def _commands(line: str) -> list[list[str]]:
    if _ASSIGNED.match(line):
        return []
    words = shlex.shlex(line.replace("$'", "'"), posix=True, punctuation_chars="&|;<>")
    words.whitespace_split = True
    found: list[list[str]] = [[]]
    redirected = False
    for word in words:
        if word in _BETWEEN:
            found.append([])
        elif word in ("<", ">"):
            redirected = True
        elif redirected:
            redirected = False
        else:
            found[-1].append(word)
    return [command for command in found if command]


def pages() -> list[str]:
    """All that git knows, or would: a new page counts before it is committed."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    told = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return sorted(page for page in told if not page.startswith(MADE) and (ROOT / page).exists())


def blocks(page: str) -> list[Block]:
    """Those of a page, in its order."""
    text = (ROOT / page).read_text()
    found: list[Block] = []
    for fenced in _FENCED.finditer(text):
        above = text[: fenced.start()].rstrip().rpartition("\n")[2]
        found.append(Block(page, fenced[1], fenced[2], above))
    return found


BLOCKS = [block for page in pages() for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
