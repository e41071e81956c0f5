"""What a scraper meets: pages by path, over HTTP or HTTPS, whoever else is connected."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from serve.server import scraping
from serve.server.exposure import is_local, warn_of_exposure
from serve.server.metrics import Metrics
from serve.server.scraping import Page, metrics_page
from serve.server.tls import Certificates
from taper_client.certificates import Paths
from taper_client.errors import PermissionDeniedError, UnauthenticatedError
from tests.serve.authorities import Authority, put, without_authorities


def counted() -> Metrics:
    metrics = Metrics()
    metrics.describe_devices("fake", 2)
    return metrics


@contextlib.contextmanager
def scraped(pages=None, host: str = "127.0.0.1", **options) -> Iterator[str]:
    """Host and port of pages that are served, /metrics alone unless there are others."""
    url, stop = scraping.listen(host, 0, pages or {"/metrics": metrics_page(counted().registry)}, **options)
    try:
        yield urlsplit(url).netloc
    finally:
        stop()


def ask(
    place: str,
    path: str = "/metrics",
    verb: str = "GET",
    context: ssl.SSLContext | None = None,
    **headers: str,
) -> http.client.HTTPResponse:
    """The answer, which is read whole."""
    connect = http.client.HTTPConnection if context is None else http.client.HTTPSConnection
    connection = connect(place, timeout=10, **({} if context is None else {"context": context}))
    with contextlib.closing(connection):
        connection.request(
            verb, path, headers={name.replace("_", "-"): each for name, each in headers.items()}
        )
        answer = connection.getresponse()
        answer.text = answer.read()  # type: ignore[attr-defined]
        return answer


def connected(place: str) -> socket.socket:
    host, _, port = place.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=10)


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server ends soon, and none of its limits of time helps where another one should."""
    monkeypatch.setattr(scraping, "_POLL_SECONDS", 0.01)
    for limit in ("SILENCE_SECONDS", "CONNECTION_SECONDS"):
        monkeypatch.setattr(scraping, limit, 600.0)


COUNTED = b'taper_devices{kind="fake"} 2.0'


# --- answers -----------------------------------------------------------------------------------------------


def test_they_are_served_on_a_port_of_their_own_until_that_is_closed():
    before = {*threading.enumerate()}
    with scraped() as place:
        listening = {*threading.enumerate()} - before
        answer = ask(place)
        assert (answer.status, COUNTED in answer.text) == (200, True)
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
    assert [thread.is_alive() for thread in listening] == [False]
    with pytest.raises(OSError, match="refused"):
        ask(place)


def test_there_is_nothing_beside_them():
    with scraped() as place:
        assert [ask(place, path).status for path in ("/", "/metrics/", "/metrics2", "/favicon.ico")] == [
            404
        ] * 4


@pytest.mark.parametrize("verb", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "WHAT"])
def test_they_are_asked_for_with_get_alone(verb):
    with scraped() as place:
        answer = ask(place, verb=verb)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET")


def test_an_address_that_is_none_is_told_so_and_is_nothing_for_the_log():
    with scraped() as place, capture_logs() as lines, connected(place) as connection:
        connection.sendall(b"GET http://[/metrics HTTP/1.1\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 400 ")
    assert not lines


def test_a_scraper_that_takes_gzip_gets_it():
    with scraped() as place:
        answer = ask(place, Accept_Encoding="gzip")
        assert answer.headers["Content-Encoding"] == "gzip"
        assert COUNTED in gzip.decompress(answer.text)


def test_a_scraper_may_ask_for_openmetrics_and_for_some_metrics():
    with scraped() as place:
        answer = ask(place, Accept="application/openmetrics-text; version=1.0.0")
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert answer.text.endswith(b"# EOF\n")
        some = ask(place, "/metrics?name[]=taper_devices").text
        assert COUNTED in some
        assert b"taper_step" not in some


@pytest.mark.parametrize("accept", ["text/plain; version=what", "application/openmetrics-text; version=1..0"])
def test_a_format_that_does_not_exist_is_answered_in_the_usual_one(accept):
    with scraped() as place:
        assert ask(place, Accept=accept).headers["Content-Type"].startswith("text/plain; version=0.0.4")


def test_no_header_is_repeated_in_two_lines():
    with scraped() as place, connected(place) as connection:
        folded = b"application/openmetrics-text; version=1.0.\r\n 0"
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: " + folded + b"\r\n\r\n")
        head = connection.makefile("rb").read().partition(b"\r\n\r\n")[0]
        assert all(b": " in line for line in head.split(b"\r\n")[1:])


def test_pages_are_by_path_and_one_that_fails_says_nothing_of_the_inside():
    def fail(asked: object) -> Page:
        raise RuntimeError("the inside")

    pages = {"/status": lambda asked: Page("text/html", b"fine"), "/broken": fail}
    with scraped(pages) as place, capture_logs() as logged:
        assert ask(place, "/status?now").text == b"fine"
        broken = ask(place, "/broken")
        assert (broken.status, broken.text) == (500, b"internal error\n")
    assert [each["event"] for each in logged] == ["a page failed"]


def test_who_may_not_see_them_is_told_why():
    def authorize(header: str | None) -> None:
        if header is None:
            raise UnauthenticatedError.because("NO_TOKEN", "a token is needed")
        if header != "Bearer good":
            raise PermissionDeniedError.because("WRONG_ROLE", "not for you")

    with scraped(authorize=authorize) as place:
        missing, wrong, good = ask(place), ask(place, Authorization="Bearer bad"), None
        assert (missing.status, missing.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert missing.text == b"a token is needed\n"
        assert (wrong.status, wrong.text) == (403, b"not for you\n")
        good = ask(place, Authorization="Bearer good")
        assert (good.status, COUNTED in good.text) == (200, True)
        assert ask(place, "/other").status == 401, "what there is, is nothing for strangers"


def test_ipv6_is_served():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with scraped(host="::1") as place:
        assert place.startswith("[::1]:")
        assert ask(place).status == 200


def test_an_address_that_is_taken_is_said_with_what_it_is_for():
    with scraped() as place:
        port = int(place.rpartition(":")[2])
        with pytest.raises(OSError, match=rf"^cannot listen on 127.0.0.1:{port} for metrics: "):
            scraping.listen("127.0.0.1", port, {})


# --- others ------------------------------------------------------------------------------------------------


def silent(connection: socket.socket) -> None:
    """Says nothing."""


def half(connection: socket.socket) -> None:
    connection.sendall(b"GET /metrics HT")


def endless(connection: socket.socket) -> None:
    connection.sendall(b"GET /metrics HTTP/1.1\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(50)))


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("begin", [silent, half, endless])
def test_slow_clients_keep_nobody_waiting(begin: Callable, encrypted: bool, tmp_path, monkeypatch):
    """Neither one nor so many that there is no room for more: the oldest goes."""
    monkeypatch.setattr(scraping, "MAX_CONNECTIONS", 3)
    authority = Authority(tmp_path)
    options = {"certificates": Certificates(without_authorities(authority.issue()))} if encrypted else {}
    context = ssl.create_default_context(cafile=authority.path) if encrypted else None
    with scraped(**options) as place, contextlib.ExitStack() as slow:
        for count in range(1, 6):
            connection = slow.enter_context(connected(place))
            begin(connection)
            assert COUNTED in ask(place, context=context).text, count


def test_threads_are_bounded(monkeypatch):
    monkeypatch.setattr(scraping, "MAX_CONNECTIONS", 3)
    with scraped() as place, contextlib.ExitStack() as slow:
        connections = [slow.enter_context(connected(place)) for _ in range(8)]
        for connection in connections[:5]:
            assert connection.recv(1) == b"", "the oldest are closed"
        assert ask(place).status == 200


@pytest.mark.parametrize("limit", ["SILENCE_SECONDS", "CONNECTION_SECONDS"])
def test_a_connection_that_says_nothing_is_closed_after_a_while(limit, monkeypatch):
    monkeypatch.setattr(scraping, limit, 0.05)
    with scraped() as place, connected(place) as connection:
        assert connection.recv(1) == b""


def test_what_comes_that_is_no_http_is_nothing_for_the_log():
    with scraped() as place, capture_logs() as logged:
        for junk in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\0" * 100_000, b"GET / HTTP/9.9\r\n\r\n"):
            with connected(place) as connection, contextlib.suppress(ConnectionError):
                connection.sendall(junk)
                connection.shutdown(socket.SHUT_WR)
                assert b"Traceback" not in connection.makefile("rb").read()
        assert ask(place).status == 200
    assert logged == []


# --- HTTPS -------------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def trusting(authority: Authority, own: Paths | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.path)
    if own is not None:
        context.load_cert_chain(str(own.cert), own.key)
    return context


def test_they_are_encrypted_where_the_server_is(authority):
    with scraped(certificates=Certificates(without_authorities(authority.issue()))) as place:
        assert COUNTED in ask(place, context=trusting(authority)).text
        with pytest.raises(OSError):  # noqa: PT011 - it says little
            ask(place)


def test_a_replaced_certificate_counts_in_the_next_connection(authority, tmp_path):
    paths, after = without_authorities(authority.issue()), Authority(tmp_path / "after")
    with scraped(certificates=Certificates(paths)) as place:
        assert ask(place, context=trusting(authority)).status == 200
        new = after.issue()
        put(new.cert, paths.cert)
        put(new.key, paths.key)
        assert ask(place, context=trusting(after)).status == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(place, context=trusting(authority))


def test_a_scraper_needs_a_certificate_where_other_clients_do(authority, tmp_path):
    foreign, expired = Authority(tmp_path / "foreign"), authority.issue("c", expired=True)
    with scraped(certificates=Certificates(authority.issue())) as place, capture_logs() as logged:
        assert ask(place, context=trusting(authority, authority.issue("scraper@here"))).status == 200
        for own in (None, foreign.issue("c"), expired):
            with pytest.raises(OSError):  # noqa: PT011 - TLS 1.3 tells who reads or who writes, as it comes
                ask(place, context=trusting(authority, own))
    assert logged == []


# --- who could reach it ------------------------------------------------------------------------------------


LOCAL = ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "unix:/run/taper", "::ffff:127.0.0.1"]
BEYOND = ["0.0.0.0", "::", "[::]", "10.1.2.3", "192.168.0.1", "2001:db8::1", "", "a" * 99]


def test_what_only_this_machine_reaches_is_local():
    assert [host for host in LOCAL if not is_local(host)] == []
    assert [host for host in BEYOND if is_local(host)] == []


@pytest.mark.parametrize(
    ("encrypted", "tokens", "client_certificates", "told"),
    [
        (False, False, False, ["whoever reaches", "prompts and answers pass unencrypted"]),
        (False, True, False, ["prompts, answers and tokens pass unencrypted"]),
        (True, False, False, ["whoever reaches"]),
        (True, True, False, []),
        (True, False, True, []),
    ],
)
def test_what_is_missing_where_others_reach_the_server_is_told(encrypted, tokens, client_certificates, told):
    have = {"encrypted": encrypted, "tokens": tokens, "client_certificates": client_certificates}
    with capture_logs() as logged:
        warn_of_exposure(["127.0.0.1", "10.1.2.3"], **have)
        warn_of_exposure(["127.0.0.1", "::1"], **have)
    assert [each["addresses"] for each in logged] == [["10.1.2.3"]] * len(told)
    assert all(text in each["event"] for text, each in zip(told, logged, strict=True))
