"""Clients that encrypt, show a certificate and bring a token, and what they are told where that fails."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.server.tls import Certificates
from taper_client import AsyncClient, Client, Tls, token_file
from taper_client import credentials as credentials_module
from taper_client.command import main
from taper_client.credentials import MAX_TOKEN, Access
from taper_client.errors import PermissionDeniedError, ServiceError, UnauthenticatedError, UnavailableError
from tests.serve.authorities import Authority, put, without_authorities
from tests.serve.fakes import FakeEngine, fork_and_join, listening

SECRET = "a-secret-of-some-length"
BEYOND = "192.0.2.1:50051"

TOKENS = f"""
[[token]]
tenant = "search"
roles = ["generate"]
token = "{SECRET}"
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def encrypted(authority: Authority) -> Iterator[str]:
    """A server with a certificate."""
    with listening(
        FakeEngine(fork_and_join), certificates=Certificates(without_authorities(authority.issue()))
    ) as address:
        yield address


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Iterator[str]:
    """A server that asks for certificates, too."""
    with listening(FakeEngine(fork_and_join), certificates=Certificates(authority.issue())) as address:
        yield address


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks for tokens."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    path.write_text(TOKENS)
    with listening(FakeEngine(fork_and_join), tokens=str(path)) as address:
        yield address


def answers(address: str, **options: Any) -> list[str]:
    """What the clients are answered: blocking and not, streaming and not."""

    async def ask() -> list[str]:
        async with AsyncClient(address, timeout=20, **options) as client:
            kinds = [type(event).__name__ async for event in client.generate("go")]
            return [kinds[0], (await client.model_info()).model, str(await client.complete("go"))]

    with Client(address, timeout=20, **options) as client:
        kinds = [type(event).__name__ for event in client.generate("go")]
        blocking = [kinds[0], client.model_info().model, str(client.complete("go"))]
    assert asyncio.run(ask()) == blocking
    return blocking


def failures(address: str, **options: Any) -> set[str]:
    """What they say before gRPC's own words, all the same."""

    async def ask() -> list[ServiceError]:
        async with AsyncClient(address, timeout=20, **options) as client:
            return [await failure_of(client.complete("go")), await failure_of(client.model_info())]

    async def failure_of(call: Any) -> ServiceError:
        with pytest.raises(ServiceError) as caught:
            await call
        return caught.value

    found = asyncio.run(ask())
    with Client(address, timeout=20, **options) as client:
        for call in (lambda: client.complete("go"), client.model_info):
            with pytest.raises(ServiceError) as caught:
                call()
            found.append(caught.value)
    assert {type(each) for each in found} <= {UnavailableError, UnauthenticatedError, PermissionDeniedError}
    assert all(str(each) == each.message for each in found)
    return {each.message.partition("; ")[0] for each in found}


ANSWER = ["Started", "tiny", "Hi. Tea: goodCoffee: bad, or x, and y So: tea."]


# --- TLS ---------------------------------------------------------------------------------------------------


def test_a_server_is_called_by_tls(encrypted, authority):
    assert answers(encrypted, tls=Tls(ca_cert_path=authority.path)) == ANSWER
    assert answers(encrypted, tls=Tls(ca_cert_path=Path(authority.path))) == ANSWER


def test_a_server_that_asks_for_a_certificate_gets_the_clients(mutual, authority):
    own = authority.issue("client@here")
    tls = Tls(ca_cert_path=authority.path, cert_path=own.cert, key_path=own.key)
    assert answers(mutual, tls=tls) == ANSWER


def test_the_system_says_whom_to_trust_unless_the_client_does(encrypted, authority, foreign, monkeypatch):
    """And no variable does."""
    monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", foreign.path)
    monkeypatch.setenv("SSL_CERT_FILE", foreign.path)
    monkeypatch.setattr(credentials_module, "SYSTEM_AUTHORITIES", ("/no/such", authority.path))
    assert answers(encrypted, tls=True) == ANSWER
    monkeypatch.setattr(credentials_module, "SYSTEM_AUTHORITIES", (foreign.path, authority.path))
    assert "is from an authority that is not trusted here" in " ".join(failures(encrypted, tls=True))


def test_a_certificate_may_have_another_name_than_the_address(authority):
    with listening(
        FakeEngine(fork_and_join),
        certificates=Certificates(without_authorities(authority.issue("taper.example"))),
    ) as address:
        tls = Tls(ca_cert_path=authority.path, server_name="taper.example")
        assert answers(address, tls=tls) == ANSWER
        assert failures(address, tls=Tls(ca_cert_path=authority.path)) == {
            f"the certificate of {address} is for another name: server_name of Tls (--tls-server-name)"
            " says for which"
        }


def test_who_does_not_encrypt_is_told_that_the_server_may_want_it(encrypted, mutual):
    for address in (encrypted, mutual):
        assert failures(address) == {f"{address} may ask for TLS: tls=True (--tls)"}
        assert failures(address, tls=False) == failures(address, tls=None)


def test_who_encrypts_is_told_that_the_server_does_not(address, authority):
    told = failures(address, tls=Tls(ca_cert_path=authority.path))
    assert told == {f"{address} seems to speak no TLS"}


def test_an_unknown_authority_is_named_as_such(encrypted, foreign):
    said = (
        f"the certificate of {encrypted} is from an authority that is not trusted here: ca_cert_path of Tls"
    )
    assert failures(encrypted, tls=Tls(ca_cert_path=foreign.path)) == {
        f"{said} (--tls-ca-cert-path) says who is"
    }


def test_an_expired_certificate_of_the_server_is_named_as_such(authority):
    expired = without_authorities(authority.issue(expired=True))
    with listening(FakeEngine(), certificates=Certificates(expired)) as address:
        told = failures(address, tls=Tls(ca_cert_path=authority.path))
        assert told == {f"the certificate of {address} has expired"}


def test_who_shows_no_certificate_or_one_that_does_not_count_is_told(mutual, authority, foreign):
    told = failures(mutual, tls=Tls(ca_cert_path=authority.path))
    options = "cert_path and key_path of Tls (--tls-cert-path, --tls-key-path)"
    assert told == {f"{mutual} may ask for a certificate: {options}"}
    for own in (foreign.issue("c"), authority.issue("c", expired=True)):
        told = failures(mutual, tls=Tls(ca_cert_path=authority.path, cert_path=own.cert, key_path=own.key))
        assert told == {
            f"{mutual} may not take this client's certificate: it has expired, or is from another authority"
        }


def test_a_server_that_is_not_there_is_no_matter_of_tls(authority):
    for tls in (None, Tls(ca_cert_path=authority.path)):
        assert failures("127.0.0.1:1", tls=tls) == {"failed to connect to all addresses"}


WRONG_FILES = [
    ({"ca_cert_path": "/no/such"}, "ca_cert_path (--tls-ca-cert-path): cannot read '/no/such': No such file"),
    (
        {"ca_cert_path": __file__},
        f"ca_cert_path (--tls-ca-cert-path): '{__file__}' holds no certificate in PEM",
    ),
    (
        {"cert_path": __file__},
        "key_path (--tls-key-path) is missing: cert_path (--tls-cert-path) is of no use",
    ),
    (
        {"key_path": __file__},
        "cert_path (--tls-cert-path) is missing: key_path (--tls-key-path) is of no use",
    ),
    (
        {"cert_path": __file__, "key_path": __file__},
        f"cert_path (--tls-cert-path): '{__file__}' holds no certificate in PEM",
    ),
]


@pytest.mark.parametrize(("paths", "said"), WRONG_FILES)
def test_files_of_no_use_are_said_when_the_client_is_made(paths, said):
    for make in makers(tls=Tls(**paths)):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
            make()


def test_a_key_that_is_not_that_of_the_certificate_is_refused(authority):
    cert, key = authority.issue("c").cert, authority.issue("c").key
    for make in makers(tls=Tls(cert_path=cert, key_path=key)):
        with pytest.raises(ValueError, match=r"^key_path \(--tls-key-path\): the key in .* is not that of"):
            make()


def test_tls_is_yes_or_no_or_a_tls():
    for make in makers(tls="yes"):
        with pytest.raises(TypeError, match=r"^tls is 'yes' \(str\): True, False or what Tls"):
            make()


def makers(address: str = "127.0.0.1:1", **options: Any) -> list[Callable[[], object]]:
    """What makes each of the clients."""

    async def make() -> None:
        await AsyncClient(address, **options).close()

    return [lambda: Client(address, **options).close(), lambda: asyncio.run(make())]


# --- tokens ------------------------------------------------------------------------------------------------


def test_a_token_goes_with_every_call(guarded):
    assert answers(guarded, token=SECRET) == ANSWER


def test_a_token_goes_by_tls(authority, tmp_path):
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TOKENS)
    own = Certificates(without_authorities(authority.issue()))
    with listening(FakeEngine(fork_and_join), certificates=own, tokens=str(tokens)) as address:
        assert answers(address, tls=Tls(ca_cert_path=authority.path), token=SECRET) == ANSWER


def test_a_token_may_be_another_for_each_call(guarded):
    given = [SECRET, "some-other-secret", SECRET]
    with Client(guarded, token=lambda: given.pop(0)) as client:
        assert client.model_info().model == "tiny"
        with pytest.raises(UnauthenticatedError):
            client.model_info()
        assert client.model_info().model == "tiny"


def test_a_file_that_holds_the_token_may_be_replaced(guarded, tmp_path):
    path, new = tmp_path / "token", tmp_path / "new"
    path.write_text("some-other-secret")
    new.write_text(f"\n  {SECRET}\r\n")
    with Client(guarded, token=token_file(path)) as client:
        with pytest.raises(UnauthenticatedError):
            client.model_info()
        put(str(new), str(path))
        assert client.model_info().model == "tiny"


def test_who_brings_no_token_is_told_how(guarded):
    assert failures(guarded) == {"a token is needed: token=... (--token-file)"}


def test_who_brings_a_wrong_token_or_has_another_role_is_told(guarded):
    with Client(guarded, token="some-other-secret") as client:
        with pytest.raises(UnauthenticatedError) as caught:
            client.complete("go")
        assert caught.value.reason == "WRONG_TOKEN"
    with Client(guarded, token=SECRET) as client, pytest.raises(PermissionDeniedError) as refused:
        client.set_policy("eager")
    assert refused.value.reason == "WRONG_ROLE"


LOCAL = [
    "127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "localhost:1", "LOCALHOST:1", "unix:/run/taper",
    "unix-abstract:taper", "dns:///localhost:1", "dns:localhost:1", "ipv4:127.0.0.1:1,127.0.0.2:2",
    "ipv6:[::1]:1", "[::ffff:127.0.0.1]:1",
]  # fmt: skip
FAR = [
    BEYOND, "taper.example:1", "localhost.example:1", "[2001:db8::1]:1", "0.0.0.0:1", "dns:///taper:1",
    "dns://localhost/taper:1", "ipv4:127.0.0.1:1,192.0.2.1:1", "ipv6:[2001:db8::1]:1", "[::ffff:192.0.2.1]:1",
    "vsock:1:1", "xds:///localhost:1", "unix.example:1", "127.0.0.1.example:1",
]  # fmt: skip


def test_a_token_does_not_leave_the_machine_unencrypted():
    for address in LOCAL:
        Access(address, None, SECRET, plaintext_token=False)
    for address in FAR:
        for tls in (None, False):
            with pytest.raises(ValueError, match=r"anybody on the way to .* could read the token") as caught:
                Access(address, tls, SECRET, plaintext_token=False)
            assert SECRET not in str(caught.value)
            with pytest.raises(ValueError, match="anybody on the way"):
                Access(address, tls, lambda: pytest.fail("it is asked for"), plaintext_token=False)
        Access(address, True, SECRET, plaintext_token=False)
        Access(address, None, SECRET, plaintext_token=True)
        Access(address, None, None, plaintext_token=False)


def test_clients_refuse_and_can_be_told_otherwise():
    for make in makers(BEYOND, token=SECRET):
        with pytest.raises(ValueError, match=r"give tls=True \(--tls\), or plaintext_token=True"):
            make()
    for options in ({"plaintext_token": True}, {"tls": True}):
        for make in makers(BEYOND, token=SECRET, **options):
            make()


def test_an_unencrypted_token_takes_no_detour(guarded, monkeypatch):
    """A proxy that the environment names is not asked."""
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert answers(guarded, token=SECRET) == ANSWER
    # That is what would have happened.
    with Client(guarded) as client, pytest.raises(UnavailableError):
        client.model_info()


WRONG_TOKENS = {
    "empty": "",
    "two lines": f"{SECRET}\n{SECRET}",
    "space": f"Bearer {SECRET}",
    "control": f"{SECRET}\x07",
    "unicode": f"{SECRET}é",
    "long": SECRET * (MAX_TOKEN // len(SECRET) + 1),
}


@pytest.mark.parametrize("wrong", WRONG_TOKENS)
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(wrong, tmp_path):
    token, path = WRONG_TOKENS[wrong], tmp_path / "token"
    path.write_text(token)
    for make in (
        lambda: Access("127.0.0.1:1", None, token, plaintext_token=False),
        lambda: Access("127.0.0.1:1", None, lambda: token, plaintext_token=False).metadata(),
        lambda: token_file(path),
    ):
        with pytest.raises(ValueError, match="token") as caught:
            make()
        shown = "".join(traceback.format_exception(caught.value))
        assert token == "" or token not in shown
        assert SECRET not in str(caught.value)


def test_a_token_is_text_and_what_is_none_is_not_shown():
    for token in (SECRET.encode(), 5):
        with pytest.raises(TypeError, match=r"^token is a \w+: a str is needed$"):
            Access("127.0.0.1:1", None, token, plaintext_token=False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^what token\(\) returned is a NoneType: a str is needed$"):
        Access("127.0.0.1:1", None, lambda: None, plaintext_token=False).metadata()  # pyright: ignore


def test_a_client_does_not_show_its_token():
    with Client("127.0.0.1:1", token=SECRET) as client:
        assert SECRET not in f"{client!r} {client}"
    assert SECRET not in repr(Access("127.0.0.1:1", None, SECRET, plaintext_token=False))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"^token file \(--token-file\): cannot read '/no/such': No such file"
    ):
        token_file("/no/such")
    with pytest.raises(ValueError, match="Is a directory"):
        token_file(tmp_path)


# --- taper-client ------------------------------------------------------------------------------------------


def test_the_command_takes_all_of_it(authority, tmp_path, capsys):
    own, tokens, token = authority.issue("client@here"), tmp_path / "tokens.toml", tmp_path / "token"
    tokens.write_text(TOKENS)
    token.write_text(f"{SECRET}\n")
    certificates = Certificates(authority.issue("taper.example"))
    with listening(FakeEngine(fork_and_join), certificates=certificates, tokens=str(tokens)) as address:
        flags = {
            "--address": address, "--tls-ca-cert-path": authority.path, "--tls-cert-path": own.cert,
            "--tls-key-path": own.key, "--tls-server-name": "taper.example", "--token-file": token,
        }  # fmt: skip
        main(["go", "--tls", *(str(part) for pair in flags.items() for part in pair)])
    assert capsys.readouterr().out == ANSWER[-1] + "\n"


def test_the_command_says_what_is_missing_in_a_line(encrypted, guarded, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "token").write_text(SECRET)
    for args, said in (
        (("--address", encrypted), f"UNAVAILABLE: {encrypted} may ask for TLS: tls=True (--tls); failed"),
        (("--address", guarded), "UNAUTHENTICATED: a token is needed: token=... (--token-file); this server"),
        (("--token-file", "/no"), "token file (--token-file): cannot read '/no': No such file"),
        (("--token-file", f"{tmp_path}/empty"), f"the token in '{tmp_path}/empty' (--token-file) is empty"),
        (("--address", BEYOND, "--token-file", f"{tmp_path}/token"), "without TLS, anybody on the way to"),
        (("--tls-key-path", "/no"), "cert_path (--tls-cert-path) is missing: key_path (--tls-key-path)"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["go", *args])
        assert str(caught.value).startswith(f"taper-client: {said}")
        assert "\n" not in str(caught.value)


def test_a_process_of_the_command_says_one_line(encrypted, foreign):
    """gRPC would say more about a handshake that fails."""
    command = [sys.executable, "-m", "taper_client", "go", "--address", encrypted]
    env = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    ran = subprocess.run(
        [*command, "--tls-ca-cert-path", foreign.path], env=env, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    assert ran.stderr.startswith("taper-client: UNAVAILABLE: the certificate of")


def test_the_command_encrypts_by_tls_alone_and_sends_a_token_in_the_open_if_told_to(monkeypatch, tmp_path):
    (tmp_path / "token").write_text(SECRET)
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "taper_client.command.Client", lambda address, **options: made.append(options) or SimpleNamespace()
    )
    for flags in (("--tls",), ("--plaintext-token",), ()):
        with pytest.raises(TypeError):  # what is made is no client
            main(["go", "--token-file", str(tmp_path / "token"), *flags])
    assert [(each["tls"], each["plaintext_token"]) for each in made] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert [each["token"]() for each in made] == [SECRET] * 3
