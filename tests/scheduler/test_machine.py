"""A scheduler under random commands: whatever comes when, nothing is lost, leaked or stuck."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from scheduler.gate import RejectedError
from scheduler.request import Request
from tests.scheduler.alphabet import FOLLOWS, TALKATIVE
from tests.scheduler.strategies import examples, plans, prompts, samplings, serving, slos, tag_programs
from tests.scheduler.symbolic import SymbolicModel
from tests.scheduler.world import Setting, World, serve, without_losers

MODEL = SymbolicModel(TALKATIVE, FOLLOWS)
POOLS = st.integers(25, 70)


class SchedulerMachine(RuleBasedStateMachine):
    """Each step checks pages, slots, costs and turns (see World); the end, that all that was not cancelled

    says what it says alone, and that every page and slot has come back.
    """

    @initialize(setting=serving, num_pages=POOLS)
    def begin(self, setting: Setting, num_pages: int) -> None:
        self.setting = Setting(
            **{name: getattr(setting, name) for name in Setting.__slots__} | {"num_pages": num_pages}
        )
        self.world = World(self.setting, MODEL)
        self.live: dict[str, Request] = {}
        self.added = 0

    @rule(prompt=prompts(), program=plans | tag_programs, sampling=samplings, slo=slos)
    def add(self, **parts: object) -> None:
        request = Request(id=f"r{self.added}", **parts)  # type: ignore[arg-type]
        self.added += 1
        try:
            self.world.add(request)
        except RejectedError as rejected:
            if rejected.reason != "KV_FULL":
                raise
        else:
            self.live[request.id] = request

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([*self.live]))
        del self.live[request_id]
        known = self.world.cancel(request_id)
        assert known or self.world.is_finished(request_id)
        assert not self.world.holds_anything(request_id)
        assert not self.world.cancel(request_id)

    @rule(policy=st.sampled_from(["off", "cap:2", "eager", "taper"]))
    def set_policy(self, policy: str) -> None:
        self.world.scheduler.controller.set_policy(policy)

    @rule(seconds=st.sampled_from([1e-4, 0.01, 1.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run([])
        alone = Setting(
            policy="off",
            in_flight=0,
            prefix_cache=False,
            num_pages=self.setting.num_pages,
            page_size=self.setting.page_size,
        )
        for request in self.live.values():
            answer = serve([request], alone, MODEL).answer(request.id)
            assert without_losers(self.world.answer(request.id)) == without_losers(answer)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = examples(80, stateful_step_count=20)
