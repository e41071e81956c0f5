"""A tokenizer that does what a text says: a reader's process meets whatever a foreign template might do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.serve.fakes import ByteTokenizer


class HostileTokenizer(ByteTokenizer):
    """One token for each byte, if it comes to that."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        what, _, more = text.partition(" ")
        if what == "LOOP":
            while True:
                pass
        elif what == "MEMORY":
            bytearray(1 << 40)
        elif what == "ABORT":
            os.abort()
        elif what == "EXIT":
            os._exit(3)
        elif what == "ONCE" and not Path(more).exists():
            Path(more).touch()
            os._exit(3)
        elif what == "BUG":
            raise KeyError(text)
        return super().encode(text, add_special_tokens)


def tokenizer(name: str) -> Any:
    """As a reader's process makes it."""
    if name == "none":
        raise ValueError("there is none")
    return HostileTokenizer()
