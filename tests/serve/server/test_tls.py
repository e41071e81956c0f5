"""Connections are encrypted with the files that are there, whenever they are replaced and however."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from serve.config import OptionError, ServerConfig
from serve.served import Served
from serve.server import tls
from serve.server.ports import Ports
from serve.server.server import serve, shut_down
from serve.server.service import Service
from serve.server.tls import OPTIONS, RETRY_SECONDS, Certificates
from taper_client import generate_request
from taper_client.certificates import Paths, Pem
from taper_client.v1 import inference_service_pb2_grpc as inference_grpc
from tests.serve.authorities import Authority, in_file, presented, put, without_authorities
from tests.serve.fakes import FakeEngine, finished, served_model
from tests.serve.server.own_loop import begin, in_loop, token, until


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


class Clock:
    """Stands still unless it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def ports(certificates: Certificates | None, engine: FakeEngine, **options) -> AsyncIterator[Ports]:
    service = Service(ServerConfig(port=0, **options))
    service.serve(Served(engine=engine, model=served_model()))
    opened = Ports(service, certificates)
    await opened.start()
    try:
        yield opened
    finally:
        await shut_down(opened, service, timeout=0.0)


def channel(address: str, roots: str | None, own: Paths | None = None) -> grpc.aio.Channel:
    """To a server whose certificate comes from an authority of the file `roots`."""
    key, cert = (Path(own.key or "").read_bytes(), Path(own.cert or "").read_bytes()) if own else (None, None)
    trusted = Path(roots or "").read_bytes()
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(trusted, key, cert))


async def is_served(address: str, roots: str | None, own: Paths | None = None) -> bool:
    async with channel(address, roots, own) as opened:
        call = health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=10)
        code = await call.code()
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
        return code is grpc.StatusCode.OK


# --- connections -------------------------------------------------------------------------------------------


@in_loop
async def test_a_stream_goes_on_while_the_certificate_is_replaced(tmp_path):
    before, after = Authority(tmp_path / "before"), Authority(tmp_path / "after")
    paths, engine = without_authorities(before.issue()), FakeEngine()
    new = after.issue()
    async with ports(Certificates(paths), engine) as opened, channel(opened.address, before.path) as old:
        call = inference_grpc.InferenceServiceStub(old).Generate(generate_request("go", request_id="r"))
        await until(engine, lambda e: "r" in e.requests)
        engine.tell("r", *begin(), token(1))
        await call.read()

        put(new.cert, paths.cert)
        put(new.key, paths.key)
        assert await asyncio.to_thread(presented, opened.address) == in_file(new.cert)
        assert await is_served(opened.address, after.path)
        assert not await is_served(opened.address, before.path)

        engine.tell("r", token(2), finished("r"))
        assert len((await call.read()).events) == 2
        assert await call.code() is grpc.StatusCode.OK


@in_loop
async def test_replaced_authorities_of_clients_count_in_new_connections(tmp_path):
    servers, first, second = (Authority(tmp_path / name) for name in ("servers", "first", "second"))
    paths = servers.issue()._replace(authorities=first.path)
    early, late = first.issue("early@clients"), second.issue("late@clients")
    async with (
        ports(Certificates(paths), FakeEngine()) as opened,
        channel(opened.address, servers.path, early) as standing,
    ):
        check = health_pb2_grpc.HealthStub(standing).Check
        await check(health_pb2.HealthCheckRequest(), timeout=10)
        assert not await is_served(opened.address, servers.path, late)
        put(second.path, first.path)
        assert await is_served(opened.address, servers.path, late)
        assert not await is_served(opened.address, servers.path, early)
        await check(health_pb2.HealthCheckRequest(), timeout=10)


@in_loop
async def test_every_port_is_encrypted_and_asks_for_certificates(authority):
    own = authority.issue()
    async with ports(Certificates(own), FakeEngine(), control_port=0) as opened:
        assert opened.control != opened.address
        for address in (opened.address, opened.control):
            assert await is_served(address, authority.path, own)
            assert not await is_served(address, authority.path)
            async with grpc.aio.insecure_channel(address) as plain:
                with pytest.raises(grpc.aio.AioRpcError):
                    await health_pb2_grpc.HealthStub(plain).Check(health_pb2.HealthCheckRequest(), timeout=10)


@pytest.mark.parametrize("fault", ["none", "expired", "foreign"])
@in_loop
async def test_a_client_needs_a_certificate_that_counts(fault, tmp_path, authority):
    expired, foreign = authority.issue("c", expired=True), Authority(tmp_path / "foreign").issue("c")
    own = {"none": None, "expired": expired, "foreign": foreign}[fault]
    async with ports(Certificates(authority.issue()), FakeEngine()) as opened:
        assert not await is_served(opened.address, authority.path, own)


# --- files -------------------------------------------------------------------------------------------------


def test_files_that_did_not_change_are_read_once(authority):
    certificates = Certificates(authority.issue())
    assert certificates.now() is certificates.now()


def test_a_file_that_is_written_to_in_place_counts(authority):
    paths, new = authority.issue(), authority.issue()
    certificates = Certificates(paths)
    for source, target in ((new.cert, paths.cert), (new.key, paths.key)):
        Path(target).write_bytes(Path(source).read_bytes())
    assert certificates.now().pem.cert == Path(new.cert).read_bytes()


def test_a_link_that_leads_elsewhere_counts(authority, tmp_path):
    """A secret that Kubernetes mounts: files are links through a link to a folder, and that is replaced."""
    for number in (1, 2):
        issued = authority.issue()
        (tmp_path / f"v{number}").mkdir()
        put(issued.cert, str(tmp_path / f"v{number}" / "tls.crt"))
        put(issued.key, str(tmp_path / f"v{number}" / "tls.key"))
    (tmp_path / "data").symlink_to("v1")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"data/{name}")
    certificates = Certificates(Paths(str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")))
    first = certificates.now().pem
    (tmp_path / "data.new").symlink_to("v2")
    os.replace(tmp_path / "data.new", tmp_path / "data")
    assert certificates.now().pem.cert == (tmp_path / "v2" / "tls.crt").read_bytes() != first.cert


GARBAGE = {
    "garbage": lambda good: b"garbage",
    "nothing": lambda good: b"",
    "half": lambda good: good[: len(good) // 2],
    "bytes": lambda good: bytes(range(256)),
}


@pytest.mark.parametrize("which", ["cert", "key", "authorities"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_last_good_files_are_kept_until_there_are_better_ones(garbage, which, authority):
    paths = authority.issue()
    certificates, good = Certificates(paths), Path(getattr(paths, which)).read_bytes()
    before = certificates.now()
    Path(getattr(paths, which)).write_bytes(GARBAGE[garbage](good))
    with capture_logs() as logged:
        assert certificates.now() is before
        assert certificates.now() is before
    (told,) = logged
    assert (told["log_level"], getattr(OPTIONS, which) in told["why"]) == ("warning", True)
    Path(getattr(paths, which)).write_bytes(good)
    assert certificates.now().pem == before.pem


def test_what_cannot_be_used_is_told_once_and_looked_at_again_after_a_while(authority):
    paths, new, clock = authority.issue(), authority.issue(), Clock()
    certificates = Certificates(paths, clock)
    before = certificates.now()
    os.remove(paths.key)
    with capture_logs() as logged:
        for clock.now in (0.0, RETRY_SECONDS, 5 * RETRY_SECONDS):
            assert certificates.now() is before
    assert [each["log_level"] for each in logged] == ["warning"]
    put(new.cert, paths.cert)
    put(new.key, paths.key)
    with capture_logs() as logged:
        assert certificates.now().pem.cert == Path(new.cert).read_bytes()
    assert [each["log_level"] for each in logged] == ["info"]


def test_files_that_are_the_same_for_the_eye_are_tried_again(authority, monkeypatch):
    """Such as on a file system that knows whole seconds only."""
    paths, new, clock = authority.issue(), authority.issue(), Clock()
    certificates = Certificates(paths, clock)
    put(new.cert, paths.cert)
    looks = tuple(map(os.stat, (paths.cert, paths.key, paths.authorities)))
    monkeypatch.setattr(
        "serve.server.tls._looks", lambda paths: looks
    )  # from here on, nothing seems to happen
    before = certificates.now()
    put(new.key, paths.key)
    assert certificates.now() is before
    clock.now += RETRY_SECONDS
    assert certificates.now().pem.cert == Path(new.cert).read_bytes()


def test_a_certificate_whose_key_is_still_to_come_waits_for_it(authority):
    paths, new = authority.issue(), authority.issue()
    certificates = Certificates(paths)
    before = certificates.now()
    put(new.cert, paths.cert)
    with capture_logs() as logged:
        assert certificates.now() is before
    assert "is not that of the certificate" in logged[0]["why"]
    put(new.key, paths.key)
    assert certificates.now().pem.key == Path(new.key).read_bytes()


def test_files_that_are_replaced_while_they_are_read_do_not_mix(authority, monkeypatch):
    """The key is that of the certificate that was read, also if both are others a moment later."""
    paths, new = authority.issue(), authority.issue()
    certificates = Certificates(paths, clock := Clock())
    before = certificates.now()
    put(authority.issue().cert, paths.cert)

    def interrupted(*args: object, **options: object) -> None:
        put(new.cert, paths.cert)
        put(new.key, paths.key)

    with monkeypatch.context() as patched:
        patched.setattr(ssl.SSLContext, "load_cert_chain", interrupted)
        assert certificates.now() is before
    clock.now += RETRY_SECONDS
    assert certificates.now().pem.key == Path(new.key).read_bytes()


def test_many_handshakes_read_a_file_once(authority, monkeypatch):
    paths, new = authority.issue(), authority.issue()
    certificates, read = Certificates(paths, clock := Clock()), []
    put(new.cert, paths.cert)
    put(new.key, paths.key)
    load = tls.load

    def slow(*args) -> Pem:
        read.append(args)
        time.sleep(0.05)  # the others come
        return load(*args)

    monkeypatch.setattr(tls, "load", slow)
    threads = [threading.Thread(target=certificates.now) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now += RETRY_SECONDS
    assert certificates.now().pem.cert == Path(new.cert).read_bytes()
    assert len(read) == 1, "by one of them, while the others wait"


# --- at start ----------------------------------------------------------------------------------------------


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(authority, tmp_path):
    paths, locked = authority.issue(), tmp_path / "locked"
    key = serialization.load_pem_private_key(Path(paths.key).read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(key.private_bytes(pem, pkcs8, encryption))
    with pytest.raises(ValueError, match=r"^--tls-key-path: the key in '.*locked' is encrypted"):
        Certificates(paths._replace(key=str(locked)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cert": "/no/such"}, "--tls-cert-path: cannot read '/no/such': No such file or directory"),
        ({"key": "/"}, "--tls-key-path: cannot read '/': Is a directory"),
        ({"cert": __file__}, f"--tls-cert-path: '{__file__}' holds no certificate in PEM"),
        ({"key": __file__}, f"--tls-key-path: '{__file__}' holds no key in PEM"),
        ({"authorities": __file__}, f"--tls-client-ca-cert-path: '{__file__}' holds no certificate in PEM"),
        ({"cert": "a\0b"}, "--tls-cert-path: cannot read 'a\\x00b': embedded null byte"),
    ],
)
def test_a_wrong_file_is_a_line_that_names_its_flag(wrong, said, authority):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Certificates(authority.issue()._replace(**wrong))


def test_certificate_and_key_and_authorities_go_together():
    for given, lacks in (
        ({"tls_cert_path": "a"}, "--tls-cert-path needs --tls-key-path, too"),
        ({"tls_key_path": "a"}, "--tls-key-path needs --tls-cert-path, too"),
        ({"tls_client_ca_cert_path": "a"}, "--tls-client-ca-cert-path needs --tls-cert-path, too"),
    ):
        with pytest.raises(OptionError) as caught:
            ServerConfig(**given)
        assert str(caught.value) == lacks


class SeenEnoughError(Exception):
    """Ends a server that has been looked at."""


def test_the_options_lead_to_every_port(authority):
    own = authority.issue()
    config = ServerConfig(
        port=0, control_port=0, metrics_port=0, metrics_host="127.0.0.2", readers=0, drain_timeout=0.0,
        tls_cert_path=own.cert, tls_key_path=own.key,
    )  # fmt: skip
    shown: list[bool] = []

    def look(ready: str) -> None:
        (metrics,) = (urlsplit(each["url"]) for each in logged if each["event"] == "metrics")
        (operators,) = (each["address"] for each in logged if each["event"] == "operators")
        addresses = (ready.split()[-1], operators, metrics.netloc)
        shown.extend(presented(address) == in_file(own.cert) for address in addresses)
        assert (metrics.scheme, metrics.hostname) == ("https", "127.0.0.2")
        raise SeenEnoughError

    with capture_logs() as logged, pytest.raises(SeenEnoughError):
        asyncio.run(serve(config, lambda *_: Served(engine=FakeEngine(), model=served_model()), look))
    assert shown == [True, True, True]


def test_metrics_are_for_those_with_their_role_and_what_is_open_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.server.exposure.is_loopback", lambda address: address == "127.0.0.1")
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        "".join(
            f'[[token]]\ntenant = "{role}"\nroles = ["{role}"]\ntoken = "the-token-for-{role}"\n'
            for role in ("metrics", "generate")
        )
    )
    config = ServerConfig(
        port=0, metrics_port=0, metrics_host="127.0.0.2", tokens=str(tokens), readers=0, drain_timeout=0.0
    )
    statuses: list[int] = []

    def look(ready: str) -> None:
        (url,) = (each["url"] for each in logged if each["event"] == "metrics")
        for role in ("metrics", "generate", "nobody"):
            asked = urllib.request.Request(url, headers={"Authorization": f"Bearer the-token-for-{role}"})
            try:
                answer = urllib.request.urlopen(asked, timeout=10)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                statuses.append(answer.status)
        raise SeenEnoughError

    with capture_logs() as logged, pytest.raises(SeenEnoughError):
        asyncio.run(serve(config, lambda *_: Served(engine=FakeEngine(), model=served_model()), look))
    assert statuses == [200, 403, 401]
    (warned,) = (each for each in logged if each["log_level"] == "warning")
    assert (warned["addresses"], "tokens pass unencrypted" in warned["event"]) == (["127.0.0.2"], True)


def test_nothing_is_loaded_where_a_file_is_wrong(authority):
    own = authority.issue()
    config = ServerConfig(port=0, tls_cert_path=own.cert, tls_key_path=authority.issue().key)
    with pytest.raises(ValueError, match=r"^--tls-key-path: the key in .* is not that of the certificate"):
        asyncio.run(serve(config, lambda *_: pytest.fail("it is loaded")))
