"""`python -m docs.make` writes every page that is made from the code."""

from __future__ import annotations

from docs.make.pages import ROOT, pages

for path, text in pages().items():
    path.write_text(text)
    print(path.relative_to(ROOT))
