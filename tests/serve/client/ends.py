"""The first event of an answer, and its last."""

from __future__ import annotations

from taper_client.events import Finished, Started, Timing, Usage

STARTED = Started(request_id="mine", prompt_tokens=3, cached_tokens=0, prompt_token_ids=(5, 6, 7))
USAGE = Usage(prompt_tokens=3, cached_tokens=0, completion_tokens=4, critical_path_tokens=2, preemptions=0)
TIMING = Timing(queue=0.5, ttft=1.0, tpot=0.25, total=2.0, tpot_slo_met=True, ttft_slo_met=False)
FINISHED = Finished(usage=USAGE, timing=TIMING)
