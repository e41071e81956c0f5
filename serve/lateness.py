"""Why a step was late: one cause for each step that took more than `LATE` times what was predicted.

    launch   the device waited: the launch was not ready in time
    seen     the step ended in time, or nearly so, and the engine came to its result late
    paused   the machine did not run the engine, which had work to do
    device   none of these: the device took longer

A cause is found where it explains at least half of the *excess*, the time beyond the prediction.
"""

from __future__ import annotations

from typing import Literal, get_args

from serve.door import StepRecord

Cause = Literal["launch", "seen", "paused", "device"]
CAUSES: tuple[Cause, ...] = get_args(Cause)

LATE = 1.15  # times the predicted seconds
EXPLAINS = 0.5  # of the excess


def cause_of_lateness(step: StepRecord, following: StepRecord | None = None) -> Cause | None:
    """Why a step was late, or None if it was not.

    `following`, the step after it, tells what the engine could not see at the time: a device that went on in
    time makes up for what the host lost.
    """
    if step.predicted <= 0 or step.seconds <= LATE * step.predicted:
        return None
    enough = EXPLAINS * _excess(step)
    if step.paused >= enough:  # whatever the engine was late with: it could not help it
        return "paused"
    if step.idle >= enough:
        return "launch"
    if step.ready or (following is not None and _made_up(step, following, enough)):
        return "seen"
    return "device"


def _excess(step: StepRecord) -> float:
    return step.seconds - step.predicted


def _made_up(step: StepRecord, following: StepRecord, enough: float) -> bool:
    """Whether the step after it, which the device went on with, was shorter by as much as explains it."""
    went_on = following.planned <= step.ended
    return went_on and -_excess(following) >= enough
