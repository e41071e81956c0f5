"""Who may start: no start breaks a target that could be kept, and none waits for one that could not."""

from __future__ import annotations

import pytest

from scheduler.request import Slo
from tests.scheduler.requests import fork, request, serial
from tests.scheduler.symbolic import TALKS_ON, rows_by_request, widths
from tests.scheduler.world import Setting, World


def test_a_running_request_is_priced_before_its_prompt_is_read() -> None:
    """c would be the fourth row of a bucket of three, though only a decodes so far."""
    world = World(Setting(buckets=(3, 32), prompt_floor=1, max_chunk=1, in_flight=0), TALKS_ON)
    slo = Slo(tpot=0.0023, ttft=9.0)
    for name in "ab":
        world.add(request(name, serial(30), prompt=1 if name == "a" else 30, slo=slo))
    world.run_until(lambda: world.emitted("a") > 1)
    assert world.running == ["a", "b"]
    world.add(request("c", serial(30), prompt=30, slo=slo))
    world.step()
    assert world.running == ["a", "b"]
    world.run([])


def test_a_request_starts_only_if_the_step_with_it_keeps_every_tpot_target() -> None:
    buckets = (2, 8)  # 1.2 ms and 1.8 ms
    world = World(Setting(buckets=buckets, prompt_floor=4), TALKS_ON)
    world.add(request("a", serial(9), slo=Slo(tpot=0.0017, ttft=9.0)))
    world.add(request("b", serial(9), slo=Slo(tpot=9.0, ttft=9.0)))
    world.run_until(lambda: world.emitted("a") > 4)
    assert world.running == ["a"]
    world.run([])
    assert world.emitted("b") == 9


def test_a_target_that_nobody_could_keep_lets_the_others_in() -> None:
    """Not even a step of one row takes as little: to wait would not help whoever asks for that."""
    world = World(Setting(buckets=(4, 8), prompt_floor=2), TALKS_ON)  # a row takes 1.4 ms
    world.add(request("greedy", serial(40), slo=Slo(tpot=1e-6, ttft=9.0)))
    for name in "ab":
        world.add(request(name, serial(9), slo=Slo(tpot=0.0025, ttft=9.0)))
    world.run_until(lambda: world.emitted("a") > 1 and world.emitted("b") > 1)
    assert world.emitted("greedy") < 40, "they do not wait for its end"
    assert world.running == ["greedy", "a", "b"]
    world.run([])


def test_a_server_that_can_keep_nobodys_target_does_not_serve_one_after_the_other() -> None:
    world = World(Setting(buckets=(4, 8), prompt_floor=2), TALKS_ON)
    for name in "abc":
        world.add(request(name, serial(20), slo=Slo(tpot=0.0013, ttft=9.0)))
    world.run_until(lambda: all(world.emitted(name) > 1 for name in "abc"))
    assert world.running == ["a", "b", "c"]
    world.run([])


def test_a_server_whose_steps_lie_near_the_target_serves_side_by_side_what_costs_nothing() -> None:
    """Eight rows take 1.8 ms, as one does, and the next bucket 7.4: it would hold the whole floor."""
    slo = Slo(tpot=0.0025, ttft=9.0)
    world = World(Setting(buckets=(8, 64), prompt_floor=32, policy="off"), TALKS_ON)
    for name in "abcdefg":
        world.add(request(name, serial(30), slo=slo))
    world.run_until(lambda: world.running == [*"abcdefg"])
    world.run([])
    assert world.steps[0].bucket == 64, "nobody decodes yet: the first prompt is read at once"
    assert all(step.bucket == 8 for step in world.steps[1:])


def test_a_margin_that_not_even_one_row_keeps_does_not_serve_one_after_the_other() -> None:
    """A twentieth under the target is less than the 1.8 ms of a row."""
    world = World(Setting(buckets=(8, 64), prompt_floor=32, policy="off"), TALKS_ON)
    for name in "ab":
        world.add(request(name, serial(5), slo=Slo(tpot=0.00189, ttft=9.0)))
    world.run_until(lambda: world.running == ["a", "b"])
    world.run([])


def test_a_target_that_the_request_could_not_keep_even_alone_over_its_prompt_holds_up_nobody() -> None:
    """A row takes 1.4 ms, and to read a prompt of 150 tokens 0.3 ms."""
    world = World(Setting(buckets=(4, 8), prompt_floor=2), TALKS_ON)
    world.add(request("long", serial(40), prompt=150, slo=Slo(tpot=0.0016, ttft=9.0)))
    for name in "abcd":
        world.add(request(name, serial(9), slo=Slo(tpot=0.1, ttft=9.0)))
    world.run_until(lambda: world.emitted("d") > 1)
    assert world.emitted("long") < 40
    world.run([])


@pytest.mark.parametrize(("binding", "width"), [(True, 1), (False, 4)])
def test_a_target_that_does_not_bind_holds_up_no_start_and_no_branch(binding: bool, width: int) -> None:
    world = World(Setting(buckets=(2, 8), prompt_floor=2, in_flight=0), TALKS_ON)
    world.add(request("tight", serial(60), slo=Slo(tpot=0.0013, ttft=9.0, binding=binding)))
    world.run_until(lambda: world.emitted("tight") == 1)
    world.add(request("forks", fork(4, tokens=5)))
    if binding:
        world.run([])
        assert all(len(rows_by_request(step)) == 1 for step in world.steps)
    else:
        world.run_until(lambda: world.scheduler.idle)
        assert max(widths(step).get("forks", 0) for step in world.steps) == width


@pytest.mark.parametrize("decoding", [False, True])
def test_a_start_weighs_what_decoding_forces_the_floor_and_every_prompt_that_is_not_read(
    decoding: bool,
) -> None:
    """The bucket of 8 takes 1.8 ms, a KV position 2 us; a start leaves a twentieth of the target."""
    world = World(Setting(buckets=(8, 32), prompt_floor=4, in_flight=0), TALKS_ON)
    positions = 4 + 50  # the floor's, and the new prompt's
    if decoding:
        world.add(request("decoding", serial(40), prompt=9))
        world.run_until(lambda: world.emitted("decoding") == 3)
        world.add(request("reading", serial(40), prompt=70))
        world.step()
        positions += 9 + 3 + 70

    def may_start(tpot: float) -> bool:
        name = f"tpot {tpot}"
        world.add(request(name, serial(40), prompt=50, slo=Slo(tpot=tpot, ttft=9.0)))
        return world.scheduler.controller.may_start(world.scheduler.live[name], world.scheduler.running)

    least = (1.8e-3 + 2e-6 * positions) / 0.95
    assert may_start(1.0001 * least)
    assert not may_start(0.9999 * least)
