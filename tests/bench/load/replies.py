"""Replies of a server, made of messages and their events."""

from __future__ import annotations

from collections.abc import Sequence

from bench.load.driver import Reply
from taper_client.v1 import inference_service_pb2 as pb


def reply(*messages: Sequence[pb.Event]) -> Reply:
    """Messages that came a second apart."""
    raw = [pb.GenerateResponse(events=events).SerializeToString() for events in messages]
    return Reply(0.0, 0.0, messages=[*enumerate(raw, start=1)])


def stage(number: int, *branches: tuple[int, int]) -> pb.Event:
    infos = [pb.Branch(branch_id=branch, parent_branch_id=parent) for branch, parent in branches]
    return pb.Event(stage_started=pb.StageStarted(stage=number, branches=infos))


def delta(branch: int, total: int) -> pb.Event:
    return pb.Event(delta=pb.BranchDelta(branch_id=branch, completion_tokens=total))


def width(now: int) -> pb.Event:
    return pb.Event(width_changed=pb.WidthChanged(width=now, wanted=9))


END = pb.Event(finished=pb.Finished())
