"""The linear view is the text that the model reads, whoever came first while its branches ran."""

from __future__ import annotations

from hypothesis import given

from scheduler.events import BranchInfo, Event, StageFinished, StageStarted, TokenEmitted
from scheduler.request import Request
from scheduler.step import Sample
from scheduler.stopping import FinishReason
from serve.server.gateway.linear import LinearView
from tests.scheduler.alphabet import FOLLOWS, TALKATIVE
from tests.scheduler.interpreter import Interpreter
from tests.scheduler.strategies import examples, loads, serving, tag_programs
from tests.scheduler.symbolic import SymbolicModel
from tests.scheduler.world import Setting, serve

FORKS = SymbolicModel(TALKATIVE, FOLLOWS)
FORKED, CLOSED, ENDED = FinishReason.FORKED, FinishReason.BRANCH_CLOSED, FinishReason.EOS


@examples(60)
@given(loads(tag_programs), serving)
def test_it_is_what_the_model_reads(load: list[Request], setting: Setting) -> None:
    world = serve(load, setting, FORKS)
    for request in load:
        view, read = LinearView(), []
        for event in world.events[request.id]:
            assert not view.is_over or not isinstance(event, TokenEmitted)
            view.add(event)
            read += view.read()
        assert view.is_over
        oracle = Interpreter(request, FORKS, setting.max_context)
        oracle.run()
        said = [*oracle.trunk.text, *oracle.trunk.own][len(request.prompt) :]
        assert [(piece.token, piece.sample is not None) for piece in read] == [
            (token.id, token.sampled) for token in said
        ]


def token(branch: int, id: int) -> TokenEmitted:
    return TokenEmitted("r", branch, Sample(id), 1)


def stage(*infos: tuple[int, int, tuple[int, ...]]) -> StageStarted:
    return StageStarted("r", 0, tuple(BranchInfo(id, parent, "", prefix) for id, parent, prefix in infos))


def end(branch: int, reason: FinishReason, *, final: bool = True) -> StageFinished:
    return StageFinished("r", 0, branch, reason, None, 1, final)


def test_the_first_branch_that_runs_is_read_as_it_grows_and_the_next_waits_for_its_end() -> None:
    view = LinearView()

    def read(*events: Event) -> list[int]:
        for event in events:
            view.add(event)
        return [piece.token for piece in view.read()]

    assert read(stage((0, 0, ())), token(0, 1)) == [1]
    assert read(end(0, FORKED, final=False), stage((1, 0, (10,)), (2, 0, (20,)))) == [10]
    assert read(token(2, 21), token(1, 11)) == [11]
    assert read(token(2, 22), end(2, CLOSED)) == []
    assert read(end(1, CLOSED)) == [20, 21, 22]
    assert read(stage((0, 0, (30,))), token(0, 31)) == [30, 31]
    assert not view.is_over
    assert read(end(0, ENDED)) == []
    assert view.is_over


def test_a_branch_that_forked_while_it_waited_is_read_whole() -> None:
    view = LinearView()
    for event in (
        stage((0, 0, ())),
        stage((1, 0, (10,)), (2, 0, (20,))),
        end(2, FORKED, final=False),
        stage((3, 2, (30,)), (4, 2, (40,))),
        token(4, 41),
        token(3, 31),
        end(4, CLOSED),
        end(3, CLOSED),
        stage((2, 2, (50,))),
        token(2, 51),
        end(2, CLOSED),
    ):
        view.add(event)
    assert [piece.token for piece in view.read()] == [10]
    view.add(end(1, CLOSED))
    assert [piece.token for piece in view.read()] == [20, 30, 31, 40, 41, 50, 51]


def test_the_view_of_a_branch_knows_nothing_of_its_parent() -> None:
    view = LinearView(root=3)
    view.add(stage((3, 0, ())))
    view.add(token(3, 7))
    view.add(end(3, ENDED))
    assert ([piece.token for piece in view.read()], view.is_over) == ([7], True)
