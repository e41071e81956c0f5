"""Messages that are made to hold a server up: each ends with its status, and nobody else notices."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from taper_client import Client
from taper_client.errors import InvalidRequestError, OverloadedError, ServiceError, from_rpc
from taper_client.v1 import control_service_pb2 as control_pb
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.waiting import is_alive, until

ROOT = Path(__file__).parents[3]
SERVER = """
import sys
from model.find import model_config, model_tokenizer
from serve.config import ServerConfig
from serve.served import Served, ServedModel
from serve.server.server import run
from tests.serve.fakes import FakeEngine
from tests.serve.server.own_loop import answer

def load(config, on_step):
    model = ServedModel.of(config, model_config(config.model), model_tokenizer(config.model)[0])
    return Served(engine=FakeEngine(answer), model=model)

run(ServerConfig(port=0, model=sys.argv[1], read_timeout=2.0, read_memory_mb=250), load)
"""
TEMPLATE = """
{%- set c = messages[0].content -%}
{%- if c == 'LOOP' -%}
  {%- for i in range(99999) -%}{%- for j in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- endif -%}
{%- if c == 'BIG' -%}{{ 'x' * 30000000 }}{%- endif -%}
{%- if c == 'HUGE' -%}{{ 'x' * 100000000000 }}{%- endif -%}
{%- if c == 'MUCH' -%}{{ c * 60000000 }}{%- endif -%}
{%- if c == 'POW' -%}{{ 9 ** (9 ** (3 * (c | length))) }}{%- endif -%}
{%- if c == 'ATTR' -%}{{ ''.__class__.__mro__ }}{%- endif -%}
{%- if c == 'GLOB' -%}{{ raise_exception.__globals__['os'] }}{%- endif -%}
{{ c[:20] }}"""
SIZE = 4 * 1024 * 1024 - 200
MIB = 1 << 20


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    begun: int = field(default=0)

    @property
    def resident(self) -> int:
        """Bytes of the server's own process."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu(self) -> float:
        """CPU seconds of the server's own process."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    for file in (ROOT / "model/tiny").iterdir():
        if file.is_file() and file.suffix in (".json", ".safetensors"):
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", SERVER, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("taper-serve ready on "), line + process.communicate()[1]
        made = Server(process, line.split()[-1])
        with Client(made.address) as client:
            client.tokenize("warm")
        made.begun = made.resident
        yield made
    finally:
        process.kill()
        process.communicate()


class Probe:
    """Checks the server's health every 20 ms, from a thread of its own; `worst` is the longest wait,
    `noise` the longest by which the machine let the thread itself be late."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._check = self._channel.unary_unary("/grpc.health.v1.Health/Check")
        self._check(b"")
        self.worst, self.noise, self.count = 0.0, 0.0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._channel.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.perf_counter()
            self._stop.wait(0.02)
            waited = time.perf_counter()
            self._check(b"", timeout=60)
            self.worst = max(self.worst, time.perf_counter() - waited)
            self.noise = max(self.noise, waited - began - 0.02)
            self.count += 1


def ended(address: str, method: str, data: bytes) -> ServiceError | None:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            if method == "Generate":
                list(channel.unary_stream(f"/taper.v1.InferenceService/{method}")(data, timeout=60))
            else:
                service = "InferenceService" if method.endswith("okenize") else "ControlService"
                channel.unary_unary(f"/taper.v1.{service}/{method}")(data, timeout=60)
        except grpc.RpcError as error:
            return from_rpc(error)
    return None


def request(**prompt) -> bytes:
    return pb.GenerateRequest(prompt=pb.Prompt(**prompt)).SerializeToString()


def chat(content: str, times: int = 1) -> bytes:
    return request(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=content)] * times))


def inside(data: bytes) -> bytes:
    """As a request's sampling options."""
    size, groups = len(data), b""
    while size > 127:
        groups, size = groups + bytes([size & 127 | 128]), size >> 7
    return b"\x3a" + groups + bytes([size]) + data


CASES = {
    "unknown fields of a small message": ("GetLoad", lambda: b"\x78\x01" * (SIZE // 2), "MESSAGE_TOO_LARGE"),
    "many ids to end": (
        "Abort",
        lambda: control_pb.AbortRequest(request_ids=[f"{i:x}" for i in range(500_000)]).SerializeToString(),
        "MESSAGE_TOO_LARGE",
    ),
    "ids to spell": (
        "Detokenize",
        lambda: pb.DetokenizeRequest(token_ids=[16383] * (SIZE // 2)).SerializeToString(),
        "INVALID_FIELD",
    ),
    "ids of a prompt": (
        "Generate",
        lambda: request(token_ids=pb.TokenIds(ids=[16383] * (SIZE // 2))),
        "PROMPT_TOO_LONG",
    ),
    "text to count": (
        "Tokenize",
        lambda: pb.TokenizeRequest(prompt=pb.Prompt(text="ab " * (SIZE // 3))).SerializeToString(),
        "PROMPT_TOO_LONG",
    ),
    "text": ("Generate", lambda: request(text="a " * (SIZE // 2)), "PROMPT_TOO_LONG"),
    "one word": ("Generate", lambda: request(text="a" * SIZE), "PROMPT_TOO_LONG"),
    "unknown fields": ("Generate", lambda: b"\xf8\x01\x01" * (SIZE // 3), "MALFORMED"),
    "unknown fields inside": ("Generate", lambda: inside(b"\xf8\x01\x01" * (SIZE // 3)), "INVALID_FIELD"),
    "turns": ("Generate", lambda: chat("a", 350_000), "INVALID_FIELD"),
    "roles": (
        "Generate",
        lambda: request(chat=pb.Chat(messages=[pb.ChatMessage(role="x" * 900, content="a")] * 4000)),
        "INVALID_FIELD",
    ),
    "a long text of the template's": ("Generate", lambda: chat("BIG"), "INVALID_FIELD"),
    "what the template may not touch": ("Generate", lambda: chat("ATTR"), "INVALID_FIELD"),
    "what the template may not reach": ("Generate", lambda: chat("GLOB"), "INVALID_FIELD"),
    "more memory than there is": ("Generate", lambda: chat("HUGE"), "PROMPT_TOO_COSTLY"),
    "more memory than one message may take": ("Generate", lambda: chat("MUCH"), "PROMPT_TOO_COSTLY"),
    "a template that loops": ("Generate", lambda: chat("LOOP"), "PROMPT_TOO_COSTLY"),
    "a template that computes": ("Generate", lambda: chat("POW"), "PROMPT_TOO_COSTLY"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_message_ends_with_its_status_and_holds_nobody_up(server: Server, case: str) -> None:
    method, make, reason = CASES[case]
    data = make()
    assert len(data) <= 1 << 22
    worst, cost = [], []
    for _ in range(3):  # what the machine itself does to the probe does not happen three times
        cpu = server.cpu
        with Probe(server.address) as probe:
            error = ended(server.address, method, data)
        worst.append(probe.worst - 2 * probe.noise)
        cost.append(server.cpu - cpu - 0.002 * probe.count)
        assert isinstance(error, InvalidRequestError | OverloadedError)
        assert error.reason == reason
        assert (error.retry_after, len(error.violations) <= 21) == (None, True)
        if worst[-1] < 0.1 and cost[-1] < 0.1:
            break
    assert min(worst) < 0.1
    assert min(cost) < 0.1, "in CPU seconds of the process that answers everybody"
    with Client(server.address) as client:
        assert client.tokenize("here") != []


def test_memory_comes_back(server: Server) -> None:
    """Of 400 MiB that come at once, and of all that was sent before, but for what lies in pieces between."""
    data = request(text="a " * (SIZE // 2))

    def send() -> None:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.address, options=options) as channel:
            generate = channel.unary_stream("/taper.v1.InferenceService/Generate")
            for call in [generate(data, timeout=60) for _ in range(25)]:
                with pytest.raises(grpc.RpcError):
                    list(call)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: server.resident < server.begun + 128 * MIB, 15)


def test_who_loops_leaves_readers_to_others(server: Server) -> None:
    """A client whose every chat loops, beside one that asks for little."""
    stop = threading.Event()

    def loop() -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.address, options=options) as channel:
            generate = channel.unary_stream("/taper.v1.InferenceService/Generate")
            calls = [generate(chat("LOOP"), timeout=60) for _ in range(20)]
            stop.wait(60)
            for call in calls:
                call.cancel()

    attacker = threading.Thread(target=loop)
    with Client(server.address) as client:
        client.tokenize("hello")
        attacker.start()
        waits = []
        for _ in range(12):
            began = time.perf_counter()
            client.tokenize("hello")
            waits.append(time.perf_counter() - began)
            time.sleep(0.02)
        stop.set()
        attacker.join()
    assert sorted(waits)[len(waits) // 2] < 0.1
    assert sorted(waits)[-3] < 2.5, "in which one message loops; a reader may have been about to start before"


def test_headers_are_bounded(server: Server) -> None:
    for size, code in ((6_000, None), (40_000, grpc.StatusCode.RESOURCE_EXHAUSTED)):
        with grpc.insecure_channel(server.address) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            got = None
            try:
                check(b"", metadata=(("long", "x" * size),), timeout=30)
            except grpc.RpcError as error:
                got = from_rpc(error).code
            assert got is code


def test_readers_end_with_their_server(server: Server) -> None:
    """The last test of this module: its server is gone."""
    threads = Path(f"/proc/{server.process.pid}/task").iterdir()
    readers = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    assert len(readers) == 2
    server.process.kill()
    server.process.wait()
    until(lambda: not any(map(is_alive, readers)))
