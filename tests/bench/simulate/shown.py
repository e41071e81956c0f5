"""What the docs show at the end of the demo."""

from __future__ import annotations

from bench.simulate.card import Outcome

FOUND = {
    policy: Outcome(
        policy=policy, kept=kept, asked=38, answer_seconds=seconds, slowest_ms=slowest, width=width
    )
    for policy, kept, seconds, slowest, width in (
        ("off", 38, 64.7, 24.2, 1.0),
        ("eager", 27, 19.0, 39.5, 6.2),
        ("taper", 38, 18.2, 32.2, 6.0),
    )
}
