"""Forks and joins against the dense oracle: one forward pass over the whole answer, with Multiverse's mask.

Branches see what came before the fork and themselves, and all start at the fork's position; what follows a
`kv` join sees everything and starts where the longest branch ended.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import pytest

from model.weights import hf_tensors
from scheduler.events import Finished, Joined
from scheduler.program import ParallelStage, Plan, SerialStage
from scheduler.request import Request, Slo
from scheduler.sampling import SamplingParams
from scheduler.stopping import FinishReason
from serve.engine.runner import Runner
from tests.model.dense import dense_logits
from tests.serve.lab import Run, run, tiny_model
from tests.serve.loads import parallel, serial
from tests.serve.one_sequence import Dense


def dense(request: Request, record: Run) -> Dense:
    """The answer that `record` gave, laid out as the plan says it must be."""
    assert isinstance(request.program, Plan)
    tokens = record.answers()[request.id].tokens
    trunk = list(tokens[()])
    sequence = Dense()
    context = sequence.append(request.prompt, (), [], 0)
    position = len(request.prompt)
    for stage in request.program.stages:
        if isinstance(stage, SerialStage):
            count = stage.stopping.max_tokens
            said, trunk = tuple(trunk[:count]), trunk[count:]
            context = sequence.append(stage.prefix, said, context, position)
            position += len(stage.prefix) + len(said)
            continue
        assert isinstance(stage, ParallelStage)
        assert stage.join == "kv"
        before, joined, longest = context, list(context), 0
        ranked = sorted(stage.branches, key=lambda spec: len(tokens[(spec.label, 0)]))
        for spec in stage.branches:
            if spec not in ranked[: stage.first_k or None]:
                continue  # it lost, and nothing follows from it
            said = tokens[(spec.label, 0)]
            joined += sequence.append(spec.prefix, said, before, position)[len(before) :]
            longest = max(longest, len(spec.prefix) + len(said))
        context, position = joined, position + longest
    assert not trunk
    return sequence


def assert_greedy(runner: Runner, request: Request, record: Run) -> None:
    sequence = dense(request, record)
    logits = dense_logits(
        hf_tensors(tiny_model(jnp.float64)),
        runner.model_config,
        sequence.tokens,
        sequence.positions,
        sequence.mask(),
    )
    best = logits.argmax(-1)
    assert [token for _, token in sequence.sampled] == [int(best[fed]) for fed, _ in sequence.sampled]


KV_PLAN = Plan(stages=(serial(5), parallel("kv", 7, 4, 12, 5), serial(60, (35, 36))))


def greedy(id: str, prompt: range, plan: Plan) -> Request:
    return Request(id=id, prompt=tuple(prompt), program=plan, slo=Slo(tpot=10.0, ttft=60.0))


@pytest.mark.parametrize("policy", ["off", "eager"])
def test_a_kv_join_is_one_forward_pass_with_the_multiverse_mask(exact_runner: Runner, policy: str) -> None:
    request = greedy("kv", range(50, 63), KV_PLAN)
    assert_greedy(exact_runner, request, run(exact_runner, [request], policy=policy))


def test_a_request_preempted_after_a_kv_join_goes_on_as_if_it_had_not_been(exact_runner: Runner) -> None:
    elder = greedy("elder", range(70, 74), Plan(stages=(serial(100),)))
    request = greedy("kv", range(50, 63), KV_PLAN)
    record = run(exact_runner, [elder, request], num_pages=34, policy="eager", prefix_cache=False)
    joined = record.events["kv"].index(next(e for e in record.events["kv"] if isinstance(e, Joined)))
    finished = record.events["kv"][-1]
    assert isinstance(finished, Finished)
    assert finished.usage.preemptions > 0
    assert replayed_after_join(record, "kv"), "it was preempted, but before the join"
    assert joined < len(record.events["kv"]) - 1
    assert_greedy(exact_runner, request, record)


def replayed_after_join(record: Run, request_id: str) -> bool:
    """Whether the trunk's segment after the join is computed from its start more than once."""
    entries = [e for step in record.steps for e in step.entries if e.request_id == request_id]
    last_segment = max(entry.segment for entry in entries)
    return sum(entry.segment == last_segment and entry.ordinal == 0 for entry in entries) > 1


def test_a_fork_and_a_kv_join_compute_no_position_twice(exact_runner: Runner) -> None:
    request = greedy("kv", range(50, 63), KV_PLAN)
    record = run(exact_runner, [request], policy="taper")
    computed: set[tuple[int, int]] = set()
    for step in record.steps:
        for entry in step.entries:
            positions = {(entry.segment, entry.ordinal + row) for row in range(entry.rows)}
            assert not computed & positions
            computed |= positions
    given = len(request.prompt) + sum(len(b.prefix) for b in KV_PLAN.stages[1].branches) + 2  # type: ignore[union-attr]
    sampled = sum(len(ids) for ids in record.answers()["kv"].tokens.values())
    assert len(computed) in (given + sampled - 1, given + sampled), "the very last token need not be computed"


def test_reprefill_reads_the_branches_as_ordinary_text(exact_runner: Runner) -> None:
    """After the join the model sees one ordinary sequence, so a plain request with that prompt agrees."""
    plan = Plan(stages=(serial(4), parallel("reprefill", 6, 9, 3), serial(7)))
    request = greedy("joined", range(50, 63), plan)
    tokens = run(exact_runner, [request]).answers()["joined"].tokens
    text = list(request.prompt) + list(tokens[()][:4])
    for index in range(3):
        text += [20 + index, 30 + index, *tokens[(str(index), 0)]]
    plain = Request(id="plain", prompt=tuple(text), program=Plan(stages=(serial(7),)))
    assert run(exact_runner, [plain]).answers()["plain"].tokens[()] == tokens[()][4:]


def race(join: str, then: SerialStage) -> Plan:
    """The second and the last branch win."""
    return Plan(stages=(serial(5), replace(parallel(join, 40, 4, 41, 5), first_k=2), then))


@pytest.mark.parametrize("policy", ["off", "eager"])
def test_what_follows_a_race_has_seen_the_winners_alone(exact_runner: Runner, policy: str) -> None:
    request = greedy("kv", range(50, 63), race("kv", serial(30, (35, 36))))
    record = run(exact_runner, [request], policy=policy)
    assert_greedy(exact_runner, request, record)
    answer = record.answers()["kv"]
    outrun = {name for name, reasons in answer.reasons.items() if FinishReason.OUTRUN in reasons}
    assert outrun == {("0", 0), ("2", 0)}
    assert all(len(answer.tokens[name]) < 10 for name in outrun), "they are stopped"


def test_a_reprefill_after_a_race_reads_the_winners_alone(exact_runner: Runner) -> None:
    request = greedy("joined", range(50, 63), race("reprefill", serial(7)))
    tokens = run(exact_runner, [request]).answers()["joined"].tokens
    text = list(request.prompt) + list(tokens[()][:5])
    for index in (1, 3):
        text += [20 + index, 30 + index, *tokens[(str(index), 0)]]
    plain = Request(id="plain", prompt=tuple(text), program=Plan(stages=(serial(7),)))
    assert run(exact_runner, [plain]).answers()["plain"].tokens[()] == tokens[()][5:]


def test_a_best_of_n_branch_is_a_plain_request_with_the_branch_s_own_noise(exact_runner: Runner) -> None:
    plan = Plan(stages=(parallel("none", 6, 6, 6, seeds=False),))
    greedy_tokens = run(exact_runner, [greedy("n", range(50, 63), plan)]).answers()["n"].tokens
    single = run(exact_runner, [greedy("one", range(50, 63), Plan(stages=(serial(6),)))]).answers()["one"]
    assert set(greedy_tokens.values()) == {single.tokens[()]}
    noisy = Request(
        id="noisy",
        prompt=tuple(range(50, 63)),
        program=plan,
        sampling=SamplingParams(temperature=1.5, seed=1),
    )
    assert len(set(run(exact_runner, [noisy]).answers()["noisy"].tokens.values())) == 3
