"""A whole answer as one sequence, as the dense oracle takes it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Dense:
    """A whole answer as one sequence: tokens, positions, who sees whom, and which tokens were sampled."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sees: list[list[int]] = field(default_factory=list)  # indices that each token sees
    sampled: list[tuple[int, int]] = field(default_factory=list)  # (index fed, token that followed)

    def append(
        self, given: tuple[int, ...], sampled: tuple[int, ...], context: list[int], position: int
    ) -> list[int]:
        """Add a run of tokens after `context`; returns the context extended by it."""
        context = list(context)
        for offset, token in enumerate((*given, *sampled)):
            if offset >= len(given):
                self.sampled.append((context[-1], token))
            context.append(len(self.tokens))
            self.tokens.append(token)
            self.positions.append(position + offset)
            self.sees.append(list(context))
        return context

    def mask(self) -> np.ndarray:
        mask = np.zeros((len(self.tokens),) * 2, bool)
        for row, seen in enumerate(self.sees):
            mask[row, seen] = True
        return mask
