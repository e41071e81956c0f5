"""The shapes in the annotations of the array rooms are checked while their tests run."""

from __future__ import annotations

from tests.shapes import import_checked

import_checked("attention", "model")
