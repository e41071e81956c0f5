"""What steps take on a device with a model, as measured: what the simulator has in place of a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scheduler.predictor import Costs, StepLatencyModel
from serve.door import StepRecord
from serve.engine.calibration import load_profile
from serve.engine.step_log import read_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What steps take on a device with a model, in seconds.

    T = form(load) * factor[bucket] * (1 + noise), or (1 + excess) in place of the noise

    forms    predictors as they were fitted to single steps (bench.device.calibrate); time is the staircase's
    factors  by bucket: how much longer such a step takes while the server is loaded (bench.device.predictor)
    noise    evenly spaced quantiles of what is left, relative to the step; none: steps are exact
    excess   what the steps of a log took beyond their predictions, relative to these and in their order: the
             steps are late as those were, and made up for it as those did
    """

    name: str
    forms: Mapping[str, Any]
    num_pages: int
    page_size: int
    factors: Mapping[int, float] = field(default_factory=dict)
    noise: tuple[float, ...] = ()
    excess: tuple[float, ...] = ()

    @classmethod
    def load(cls, name: str) -> Profile:
        """The profile at the path `name`, or the one shipped under that name. Raises ValueError, OSError."""
        record = load_profile(name)
        serving = record.get("serving", {})
        return cls(
            name=record["name"],
            forms=record["forms"],
            num_pages=record["num_pages"],
            page_size=record["page_size"],
            factors={int(bucket): factor for bucket, factor in serving.get("factors", {}).items()},
            noise=tuple(serving.get("noise", ())),
        )

    @property
    def bucket_seconds(self) -> dict[int, float]:
        return {int(rows): seconds for rows, seconds in self.forms["staircase"]["buckets"].items()}

    @property
    def costs(self) -> Costs:
        return Costs(**self.forms["staircase"]["costs"])

    def latency(self, form: str = "staircase") -> StepLatencyModel:
        """A predictor as a server starts with it."""
        return StepLatencyModel.from_profile({"forms": self.forms}, form=form)

    def exact(self) -> Profile:
        """The same without noise, or a log's excess."""
        return replace(self, noise=(), excess=())

    def replaying(self, steps: Iterable[StepRecord]) -> Profile:
        """The same with the excess of these steps. Raises ValueError if none was predicted."""
        excess = tuple(step.seconds / step.predicted - 1.0 for step in steps if step.predicted > 0)
        if not excess:
            raise ValueError("no step of the log was predicted")
        return replace(self, excess=excess)


def late_as(profile: Profile, step_log: Path | None) -> Profile:
    """A profile that replays a step log, if there is one. Raises ValueError, OSError for one that is none."""
    if step_log is None:
        return profile
    with step_log.open() as lines:
        return profile.replaying(read_steps(lines))
