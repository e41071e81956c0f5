"""The tokenizer of the default model, and the folder that it comes from."""

from __future__ import annotations

from pathlib import Path

import model.tiny
from model.tokenizer import Tokenizer

TINY = Path(model.tiny.__file__).parent
tiny = Tokenizer.from_folder(TINY)
