"""A server and its engine as the two processes that they are: neither outlives the other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from serve.config import OptionError, ServerConfig
from serve.remote.spawn import spawned
from taper_client import Client, branch, generate_request, parallel
from taper_client.errors import InternalError, UnavailableError, from_rpc
from taper_client.events import Finished
from taper_client.v1 import inference_service_pb2_grpc as inference_grpc
from tests.serve.remote.both import ROOT, SERVER, Both, begun, end
from tests.serve.remote.slow import GREEDY, LEAVING, STUCK, UNLUCKY
from tests.serve.waiting import until

LONG = 500  # tokens: ten seconds


@pytest.fixture
def both() -> Iterator[Both]:
    made = begun()
    try:
        assert made.server.stdout is not None
        line = made.server.stdout.readline()
        assert line.startswith("taper-serve ready on "), line
        made.address = line.split()[-1]
        yield made
    finally:
        end(made)


def test_requests_are_served_and_a_signal_drains_both(both: Both) -> None:
    with Client(both.address) as client:
        assert client.complete([1], max_tokens=5).usage.completion_tokens == 5
        with client.generate([1], max_tokens=30) as running:
            events = iter(running)
            next(events)
            os.killpg(both.server.pid, signal.SIGINT)  # as a terminal does: to both of them
            *_, last = events
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == 30, "what ran is finished"
    assert both.server.wait(15) == 0
    assert both.server.stdout is not None
    assert both.server.stdout.read() == "imported []\n", "JAX is the engine's alone"
    until(lambda: not both.engine_is_alive)


def test_when_the_engines_process_dies_callers_are_told_and_the_server_ends(both: Both) -> None:
    with Client(both.address) as client, client.generate([1], max_tokens=LONG) as running:
        events = iter(running)
        next(events)
        os.kill(both.engine, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(InternalError) as caught:
            for _ in events:
                pass
        told = time.monotonic() - began
    assert caught.value.reason == "ENGINE_FAILED"
    assert told < 1.0
    assert both.server.wait(10) != 0


def test_a_step_that_never_ends_ends_both(both: Both) -> None:
    with Client(both.address) as client, client.generate([1], max_tokens=LONG) as running:
        events = iter(running)
        next(events)
        stuck = client.generate([STUCK], max_tokens=1)
        with pytest.raises(InternalError) as caught:
            for _ in events:
                pass
        assert caught.value.reason == "ENGINE_FAILED"
        with pytest.raises(InternalError):
            for _ in stuck:
                pass
    assert both.server.wait(10) != 0
    assert not both.engine_is_alive


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (GREEDY, "the engine failed: a step found no memory: start again with fewer --num-pages"),
        (LEAVING, "the engine failed: a step failed: SystemExit: 0"),
    ],
)
def test_a_step_that_fails_ends_both_and_the_server_says_why(both: Both, prompt: int, said: str) -> None:
    with Client(both.address) as client, client.generate([1], max_tokens=LONG) as running:
        events = iter(running)
        next(events)
        for answer in (client.generate([prompt], max_tokens=1), events):
            with pytest.raises(InternalError) as caught:
                for _ in answer:
                    pass
            assert caught.value.reason == "ENGINE_FAILED"
    assert both.server.wait(10) == 1
    assert not both.engine_is_alive
    assert both.server.stderr is not None
    assert said in both.server.stderr.read().splitlines()[-1]


def test_an_engine_that_is_stopped_for_a_while_goes_on(both: Both) -> None:
    with Client(both.address) as client, client.generate([1], max_tokens=30) as running:
        events = iter(running)
        next(events)
        os.kill(both.engine, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(both.engine, signal.SIGCONT)
        *_, last = events
    assert isinstance(last, Finished)


def test_a_server_that_is_stopped_for_long_does_not_take_that_for_its_engines_fault(both: Both) -> None:
    with Client(both.address) as client, client.generate([1], max_tokens=150) as running:
        events = iter(running)
        next(events)
        os.kill(both.server.pid, signal.SIGSTOP)
        time.sleep(3.5)
        os.kill(both.server.pid, signal.SIGCONT)
        *_, last = events
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == 150


def test_when_the_server_dies_its_engine_ends(both: Both) -> None:
    with Client(both.address) as client, client.generate([1], max_tokens=LONG) as running:
        events = iter(running)
        next(events)
        both.server.kill()
        assert until(lambda: not both.engine_is_alive, 5) < 1.0
        with pytest.raises(UnavailableError):
            for _ in events:
                pass


def test_a_second_signal_ends_both_at_once(both: Both) -> None:
    with Client(both.address) as client, client.generate([1], max_tokens=LONG) as running:
        events = iter(running)
        next(events)
        both.server.terminate()
        time.sleep(0.2)
        both.server.terminate()
        with pytest.raises(UnavailableError):
            for _ in events:
                pass
    assert both.server.wait(5) == 0
    until(lambda: not both.engine_is_alive)


def test_a_cancelled_call_leaves_no_page_behind(both: Both) -> None:
    with Client(both.address) as client:
        with client.generate([1], max_tokens=LONG) as running:
            events = iter(running)
            next(events)
            assert client.load().running_requests == 1
        until(lambda: client.load().running_requests == 0 and client.load().kv_used_tokens == 0)


@pytest.mark.full
def test_an_engine_that_is_killed_while_it_drains_is_a_failure(both: Both) -> None:
    with Client(both.address) as client, client.generate([1], max_tokens=LONG) as running:
        events = iter(running)
        next(events)
        both.server.terminate()
        time.sleep(0.2)
        os.kill(both.engine, signal.SIGKILL)
        with pytest.raises(InternalError):
            for _ in events:
                pass
    assert both.server.wait(10) == 1


@pytest.mark.full
@pytest.mark.parametrize("dies", [True, False])
def test_it_does_not_matter_whether_anybody_reads_the_log(both: Both, dies: bool) -> None:
    assert both.server.stderr is not None
    both.server.stderr.close()
    with Client(both.address) as client, client.generate([1], max_tokens=30) as running:
        events = iter(running)
        next(events)
        if dies:
            os.kill(both.engine, signal.SIGKILL)
            with pytest.raises(InternalError):
                for _ in events:
                    pass
        else:
            both.server.terminate()
            assert isinstance([*events][-1], Finished)
    assert both.server.wait(10) == int(dies)
    both.server.stderr = None


def test_a_client_that_never_reads_is_given_up_and_fills_no_memory() -> None:
    """Its own side takes no more than 64 KiB unread."""
    both = begun(program=SERVER.replace("slow.main", "slow.wide"))
    try:
        assert both.server.stdout is not None
        address = both.server.stdout.readline().split()[-1]
        memory = Path(f"/proc/{both.server.pid}/statm")
        before = int(memory.read_text().split()[1])
        branches = [branch([n], max_tokens=600, ignore_eos=True) for n in range(1, 33)]
        plan = [parallel(branches, join="none")]
        message = generate_request([1], plan=plan, token_ids=True)
        narrow = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535))
        with grpc.insecure_channel(address, options=narrow) as channel, Client(address) as client:
            client.set_policy("eager")
            call = inference_grpc.InferenceServiceStub(channel).Generate(message, timeout=60)
            until(lambda: client.load().running_requests == 1)
            until(lambda: client.load().running_requests == 0, 30)
            pages = int(memory.read_text().split()[1]) - before
            with pytest.raises(grpc.RpcError) as caught:
                for _ in call:
                    pass
        assert from_rpc(caught.value).reason == "SLOW_CONSUMER"
        assert pages * os.sysconf("SC_PAGE_SIZE") < 20 * 2**20
    finally:
        end(both)


def test_a_log_that_takes_no_more_holds_up_nobody() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"-" * 4096)
    os.set_blocking(writer, True)
    quiet = [sys.executable, "-P", "-c", SERVER.replace("slow.main", "slow.quiet"), "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(quiet, stdout=subprocess.PIPE, stderr=writer, text=True, env=environment)
    try:
        assert server.stdout is not None
        with Client(server.stdout.readline().split()[-1]) as client:
            client.complete([1], max_tokens=2)
            server.terminate()
            assert server.wait(15) == 0
    finally:
        server.kill()
        server.communicate(timeout=20)
        os.close(reader)
        os.close(writer)


def test_signals_are_the_servers_even_before_the_engines_process_has_begun() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, "0"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        until(lambda: bool(children.read_text()), 20)
        engine = int(children.read_text())
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(engine, number)
        assert server.stdout is not None
        assert server.stdout.readline().startswith("taper-serve ready")
        server.terminate()
        assert server.wait(15) == 0
    finally:
        server.kill()
        server.communicate(timeout=20)


def test_an_engine_that_does_not_start_says_why_and_ends_both() -> None:
    both = begun(UNLUCKY)
    try:
        _, said = both.server.communicate(timeout=30)
        assert both.server.returncode == 1
        assert "ValueError: an unlucky number" in said
        until(lambda: not both.engine_is_alive)
    finally:
        end(both)


def test_an_engine_that_does_not_listen_yet_ends_with_its_server() -> None:
    both = begun(program=SERVER.replace("slow.main", "slow.deaf"))
    both.server.kill()
    until(lambda: not both.engine_is_alive)
    end(both)


@pytest.mark.full
def test_modules_in_the_folder_that_the_server_is_run_from_are_not_the_engines(tmp_path: Path) -> None:
    (tmp_path / "structlog.py").write_text("raise SystemExit('this is somebody else')")
    both = begun(UNLUCKY, cwd=tmp_path)
    assert "an unlucky number" in both.server.communicate(timeout=30)[1]


@pytest.mark.full
def test_a_process_that_nobody_uses_ends_with_its_context() -> None:
    with spawned("tests.serve.remote.slow.main"):
        pass
    with pytest.raises(KeyError), spawned("tests.serve.remote.slow.main"):
        raise KeyError("what else went wrong is told")


def test_a_model_that_is_not_there_is_told_with_its_flag() -> None:
    with (
        spawned("tests.serve.remote.slow.main") as load,
        pytest.raises(OptionError, match=r"^--model: no model 'nowhere'"),
    ):
        load(ServerConfig(model="nowhere"), print)
