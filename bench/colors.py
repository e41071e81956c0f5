"""How a policy is drawn, the same in every picture: a color, and a mark for those who cannot tell colors."""

from __future__ import annotations

from typing import Any

_LOOKS = {
    "taper": ("#2563c9", "o"),
    "eager": ("#d97a06", "s"),
    "off": ("#7b8794", "v"),
    "cap:2": ("#9bd0b0", "P"),
    "cap:4": ("#1c8a52", "^"),
    "cap:6": ("#5c7f2a", "D"),
    "cap:8": ("#8a5fbf", "X"),
}
_OTHERS = ("#b8336a", "#00838f", "#6d4c41", "#455a64")


def look(policy: str) -> dict[str, Any]:
    """Its color and marker for matplotlib; a policy without a name of its own has one of a few others."""
    color, marker = _LOOKS.get(policy) or (_OTHERS[sum(policy.encode()) % len(_OTHERS)], "*")
    return {"color": color, "marker": marker}
