"""What a scheduler is given: its sizes, and the limits within which requests wait, start and run."""

from __future__ import annotations

import math
from dataclasses import dataclass

RESERVE = 0.1  # of what running requests may still need: see SchedulerConfig.reserve


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes, and the rules of starting.

    num_pages, page_size  the KV pool
    num_slots             branches that can keep device state at once; at least twice the largest bucket
    max_context           positions that a branch may fill
    max_queue             requests that may wait
    max_client_queue      of one client
    max_client_running    requests of one client that may run at once
    max_client_kv         share of the pages that the worst cases of those may come to
    reserve               share of the pages by which running requests may still grow that a new one leaves
                          to them
    prefix_cache          keep full prompt pages for later requests
    """

    num_pages: int
    page_size: int
    num_slots: int
    max_context: int
    max_queue: int = 1024
    max_client_queue: float = math.inf
    max_client_running: float = math.inf
    max_client_kv: float = math.inf
    reserve: float = RESERVE
    prefix_cache: bool = True

    @property
    def max_client_pages(self) -> float:
        """Pages that `max_client_kv` comes to."""
        return self.max_client_kv * self.num_pages
