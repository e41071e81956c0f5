"""The instructions of the Dockerfile."""

from __future__ import annotations

import re

from tests.deploy.live import ROOT

DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def the(word: str) -> str:
    """The one instruction of its kind."""
    (found,) = (rest for each, rest in instructions() if each == word)
    return found
