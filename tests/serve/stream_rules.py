"""What every stream of events obeys, whatever was asked for: the rules of the protos, event by event."""

from __future__ import annotations

import math
from collections import defaultdict

from taper_client.v1 import inference_service_pb2 as pb

TIMES = ("queue_time", "time_to_first_token", "time_per_output_token", "total_time")


class StreamRules:
    """Follows one stream; `faults` are the rules that it broke."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.started: pb.Started | None = None
        self.finished: pb.Finished | None = None
        self._stages: dict[int, list[int]] = {}
        self._known = {0}  # branches
        self._staged: set[int] = set()
        self._counts: dict[int, int] = defaultdict(int)
        self._ends: dict[int, pb.BranchFinished] = {}

    def message(self, message: pb.GenerateResponse) -> None:
        self._expect(bool(message.events), "a message without events")
        for event in message.events:
            kind = event.WhichOneof("kind")
            self._expect(kind is not None, "an event of no kind")
            self._expect(self.finished is None, f"{kind} after Finished")
            self._expect((self.started is None) == (kind == "started"), f"{kind} at the wrong place")
            if kind is not None:
                getattr(self, f"_{kind}")(getattr(event, kind))

    def end(self) -> list[str]:
        """The faults of a stream that ended well."""
        if self.started is None or self.finished is None:
            self.faults.append("no Started, or no Finished")
            return self.faults
        open_still = self._known - self._ends.keys()
        self._expect(not open_still, f"branches without an end: {sorted(open_still)[:5]}")
        usage = self.finished.usage
        total = sum(end.completion_tokens for end in self._ends.values())
        self._expect(
            usage.completion_tokens == total, f"{usage.completion_tokens} tokens, and {total} of branches"
        )
        self._expect(usage.critical_path_tokens <= total, "a path longer than the whole")
        self._expect(usage.prompt_tokens == self.started.prompt_tokens, "two lengths of the prompt")
        self._expect(usage.cached_tokens <= usage.prompt_tokens, "more cached than the prompt has")
        for name in TIMES:
            time = getattr(self.finished.timing, name).ToNanoseconds()
            self._expect(time >= 0, f"{name} is negative")
        return self.faults

    # --- by the kind of the event ----------------------------------------------------------------------

    def _started(self, event: pb.Started) -> None:
        self.started = event
        self._expect(event.prompt_tokens > 0, "no prompt")
        self._expect(len(event.prompt_token_ids) in (0, event.prompt_tokens), "another prompt")

    def _stage_started(self, event: pb.StageStarted) -> None:
        self._expect(event.stage == len(self._stages), f"stage {event.stage} is not the next one")
        self._expect(bool(event.branches), "a stage without branches")
        self._stages[event.stage] = [branch.branch_id for branch in event.branches]
        for branch in event.branches:
            known = branch.branch_id in self._known or branch.parent_branch_id in self._known
            self._expect(known, f"branch {branch.branch_id} of nobody")
            self._expect(
                branch.branch_id not in self._ends, f"branch {branch.branch_id} goes on after its end"
            )
            self._known.add(branch.branch_id)
            self._staged.add(branch.branch_id)

    def _delta(self, event: pb.BranchDelta) -> None:
        branch = event.branch_id
        self._expect(branch in self._staged, f"a delta of {branch}, which has no stage")
        self._expect(branch not in self._ends, f"a delta of {branch} after its end")
        self._expect(
            event.completion_tokens >= self._counts[branch], f"{branch} has fewer tokens than before"
        )
        self._counts[branch] = event.completion_tokens
        for token in event.logprobs:
            self._expect(token.logprob <= 1e-4 and not math.isnan(token.logprob), "no probability")

    def _width_changed(self, event: pb.WidthChanged) -> None:
        self._expect(0 < event.width <= event.wanted, f"width {event.width} of {event.wanted}")

    def _branch_finished(self, event: pb.BranchFinished) -> None:
        branch = event.branch_id
        self._expect(branch in self._known, f"an end of {branch}, which is unknown")
        self._expect(branch not in self._ends, f"two ends of {branch}")
        self._expect(event.finish_reason != pb.FINISH_REASON_UNSPECIFIED, f"{branch} ends without a reason")
        counts = event.completion_tokens == self._counts[branch]
        self._expect(counts, f"{branch} ends with {event.completion_tokens}, not {self._counts[branch]}")
        self._ends[branch] = event

    def _joined(self, event: pb.Joined) -> None:
        members = self._stages.get(event.stage, [])
        self._expect({*event.branch_ids} <= {*members}, f"stage {event.stage} joins branches of others")
        self._expect({*event.branch_ids} <= self._ends.keys(), f"stage {event.stage} joins what runs")

    def _finished(self, event: pb.Finished) -> None:
        self.finished = event

    def _expect(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)
