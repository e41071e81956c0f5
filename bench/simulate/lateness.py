"""How late a server's steps were, in a few hundred numbers: what is kept of the log of a run.

A step is late, or early, by what it took beyond the device's prediction: that of a profile, which learns
nothing while the server runs. A part of it goes with the size of the step (`factors`). What is left
(`excess`) is of a few steps in a row: one that made up for the step before it counts for nothing, and where
the host was slow for a second, it is so again in a simulation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from bench.simulate.profile import Profile
from serve.door import StepRecord

MOST = 400  # numbers of a run's excess
ENOUGH = 50  # steps of a bucket from which on it has a factor of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Lateness:
    """Of the steps of a run.

    profile  which one predicted them: its name, and a hash of what it says
    factors  by bucket: seconds that its steps took, over those that were predicted
    steps    so many in a row have one excess
    excess   the same ratio, after the factors, less one
    """

    profile: str
    factors: Mapping[int, float]
    steps: int
    excess: Sequence[float]

    @classmethod
    def of(cls, steps: Sequence[StepRecord], profile: Profile) -> Self:
        """Raises ValueError if there are none, or if one is larger than all that the profile has."""
        if not steps:
            raise ValueError("there is no step of this run")
        device = profile.latency()
        if max(step.load.rows for step in steps) > device.buckets.largest:
            raise ValueError(f"profile {profile.name} has no step as large as one of this run")
        took = np.array([step.seconds for step in steps])
        predicted = np.array([device.predict(step.load) for step in steps])
        buckets = np.array([step.bucket for step in steps])
        factors: dict[int, float] = {}
        expected = predicted.copy()
        for bucket in profile.bucket_seconds:
            own = buckets == bucket
            counted = own if own.sum() >= ENOUGH else slice(None)
            factors[bucket] = round(float(took[counted].sum() / predicted[counted].sum()), 4)
            expected[own] *= factors[bucket]
        size = math.ceil(len(steps) / MOST)
        firsts = range(0, len(steps), size)
        ratios = np.add.reduceat(took, firsts) / np.add.reduceat(expected, firsts)
        excess = [round(each - 1.0, 4) for each in ratios.tolist()]
        return cls(profile=identity(profile), factors=factors, steps=size, excess=excess)

    def on(self, profile: Profile) -> Profile:
        """The profile whose steps are as late. Raises ValueError if these were predicted by another one."""
        if (other := identity(profile)) != self.profile:
            raise ValueError(f"lateness beyond profile {self.profile} says nothing about {other}")
        excess = tuple(each for each in self.excess for _ in range(self.steps))
        return replace(profile, factors=self.factors, excess=excess)

    @classmethod
    def of_run(cls, path: Path) -> Self:
        """Of the only row in a file of bench.headline. Raises ValueError if it has none, OSError."""
        (row,) = json.loads(path.read_text())["rows"]
        if (late := row.get("lateness")) is None:
            raise ValueError(f"{path} does not say how late its steps were")
        return cls.of_json(late)

    @classmethod
    def of_json(cls, record: Mapping[str, Any]) -> Self:
        """JSON's keys are strings."""
        return cls(**{**record, "factors": {int(rows): each for rows, each in record["factors"].items()}})


def identity(profile: Profile) -> str:
    """Changes whenever the profile is measured again."""
    says = json.dumps(profile.forms["staircase"], sort_keys=True)
    return f"{profile.name} {hashlib.sha256(says.encode()).hexdigest()[:8]}"
