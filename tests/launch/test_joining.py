"""What is checked before a Ray cluster is joined: its address, whether somebody listens there, and that the token is the user's alone."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hecate.errors import UserError
from hecate.launch.ray_job.cluster import check_token, is_loopback, refuse_if_nobody_listens, split_address


@pytest.mark.parametrize(
    ("address", "parts"), [("10.0.0.1:6379", ("10.0.0.1", 6379)), ("head:1", ("head", 1)), ("::1:65535", ("::1", 65535))]
)
def test_an_address_is_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["head", ":6379", "head:", "head:0", "head:65536", "head:x", "ray://head:6379", "http://head:1"])
def test_what_is_no_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(UserError, match=rf"^--address: must be HOST:PORT .* such as 10\.0\.0\.1:6379, got '{address}'$"):
        split_address(address)


def test_which_hosts_are_this_machine() -> None:
    assert [host for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "10.0.0.1", "head") if is_loopback(host)] == [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "localhost",
    ]


def test_nobody_at_an_address_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refuse_if_nobody_listens("127.0.0.1", port, "Ray cluster")
    with pytest.raises(UserError, match=rf"^no Ray cluster at 127\.0\.0\.1:{port}: Connection refused\n  is it running"):
        refuse_if_nobody_listens("127.0.0.1", port, "Ray cluster")


def test_a_token_must_be_there_and_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=rf"^{token}: there is no Ray token"):
        check_token()
    token.write_text("secret")
    for mode in (0o604, 0o640):
        token.chmod(mode)
        with pytest.raises(UserError, match=rf"^{token}: other users can read the token; mend it with: chmod 600 {token}$") as caught:
            check_token()
        assert "secret" not in str(caught.value)
    token.chmod(0o600)
    check_token()
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    check_token()
