"""The store of a job answers those who hold its secret as torch's own stores do, and nobody else at all."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hecate.ranks import job_store
from hecate.ranks.job_store import JobStore, StoreServer
from testing.ranks import run_ranks

SECRET = b"the secret of this test, and long"
SECONDS = timedelta(seconds=20)


@pytest.fixture
def server() -> StoreServer:
    return StoreServer("127.0.0.1", 0, SECRET)


def client(server: StoreServer, secret: bytes = SECRET, timeout: timedelta = SECONDS) -> JobStore:
    return JobStore(server.host, server.port, secret, timeout)


@pytest.fixture(params=["ours", "torch's"])
def store(request: pytest.FixtureRequest, server: StoreServer) -> dist.Store:
    """Both are held to the same tests."""
    return client(server) if request.param == "ours" else dist.HashStore()


def test_keys_are_set_read_counted_and_deleted(store: dist.Store) -> None:
    store.set("a", "text")
    store.set("b", "\x00 and an empty one")
    store.set("c", "")
    assert (store.get("a"), store.get("b"), store.get("c")) == (b"text", b"\x00 and an empty one", b"")
    assert store.multi_get(["b", "a"]) == [b"\x00 and an empty one", b"text"]
    assert (store.add("n", 2), store.add("n", -5), store.get("n")) == (2, -3, b"-3")
    assert store.check(["a", "n"])
    assert not store.check(["a", "missing"])
    before = store.num_keys()
    assert store.delete_key("a")
    assert not store.delete_key("a")
    assert store.num_keys() == before - 1


def test_a_key_is_waited_for(store: dist.Store) -> None:
    threading.Timer(0.2, lambda: store.set("late", "here")).start()
    store.wait(["late"], SECONDS)
    assert store.get("late") == b"here"
    with pytest.raises(dist.DistError):
        store.wait(["never"], timedelta(seconds=0.2))


def test_one_client_serves_many_threads(server: StoreServer) -> None:
    store = client(server)
    waiting = [threading.Thread(target=store.wait, args=(["go"],)) for _ in range(8)]
    for thread in waiting:
        thread.start()
    for _ in range(50):
        store.add("n", 1)
    store.set("go", "")
    for thread in waiting:
        thread.join(10)
    assert not any(thread.is_alive() for thread in waiting)
    assert client(server).get("n") == b"50"


def summed(rank: int, world_size: int, port: int) -> float:
    """What gloo sums where the ranks have met in the store."""
    dist.destroy_process_group()
    base = JobStore("127.0.0.1", port, SECRET, SECONDS)
    dist.init_process_group("gloo", store=dist.PrefixStore("generation-0", base), rank=rank, world_size=world_size, timeout=SECONDS)
    group = dist.new_group(list(range(world_size)))
    value = torch.tensor(float(rank + 1))
    dist.all_reduce(value, group=group)
    return float(value)


def test_ranks_meet_in_it(server: StoreServer) -> None:
    assert run_ranks(3, summed, server.port) == [6.0] * 3


def test_without_the_secret_nobody_is_answered(server: StoreServer) -> None:
    client(server).set("kept", "as it was")
    with pytest.raises(dist.DistStoreError, match="has another secret than this process"):
        client(server, b"a guess that is long enough, too")
    with pytest.raises(dist.DistError):
        dist.TCPStore(server.host, server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2)).set("kept", "forged")
    assert client(server).get("kept") == b"as it was"


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"\xff" * 100_000, bytes(range(64))])
def test_a_stranger_hears_a_random_number_and_no_more(server: StoreServer, said: bytes) -> None:
    with socket.create_connection((server.host, server.port)) as stranger:
        stranger.settimeout(20)
        heard = b""
        try:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            while part := stranger.recv(1000):
                heard += part
        except OSError:  # it was closed with unread bytes, or before all was said
            pass
    assert len(heard) <= 32
    assert client(server).num_keys() == 0


def test_what_was_said_before_is_no_answer_to_another_number(server: StoreServer) -> None:
    """Who has listened to a member's answer cannot give it again, and cannot end the conversation of another."""

    def answer(theirs: bytes) -> bytes:
        mine = b"m" * 32
        return mine + job_store._sign(SECRET, b"client", theirs, mine)

    with socket.create_connection((server.host, server.port)) as member:
        said = answer(member.recv(32))
        member.sendall(said)
        assert len(member.recv(32)) == 32, "it is let in"
    with socket.create_connection((server.host, server.port)) as stranger:
        stranger.settimeout(20)
        stranger.recv(32)
        stranger.sendall(said)
        assert stranger.recv(32) == b""


def test_a_message_that_was_changed_repeated_or_is_too_long_ends_the_conversation(server: StoreServer) -> None:
    for changed in ("byte", "repeated", "length"):
        store = client(server)
        (conversation,) = store._idle
        real = conversation._connection
        tap = mock.Mock()
        conversation._connection = tap
        conversation.send([b"add", b"n", b"1"])
        data = tap.sendall.call_args.args[0]
        if changed == "byte":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif changed == "length":
            data = (1 << 31).to_bytes(4, "little") + data[4:]
        else:
            data += data
        real.settimeout(20)
        real.sendall(data)
        answer = b""
        with suppress(ConnectionError):  # it was closed with unread bytes
            while part := real.recv(1000):
                answer += part
        assert len(answer) == (41 if changed == "repeated" else 0), "one answer to the first of two"
    assert client(server).get("n") == b"1"


def test_connections_that_say_nothing_keep_nobody_out(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "_ADMISSION_SECONDS", 1.0)
    held = [socket.create_connection((server.host, server.port)) for _ in range(100)]
    client(server).set("a", "b")
    ends = []
    for one in held:
        one.settimeout(20)
        try:
            while one.recv(100):
                pass
        except ConnectionError:
            pass
        ends.append(time.monotonic())
    assert len(ends) == 100, "each is closed after a while"
    assert server._strangers == []


def test_a_server_that_does_not_hold_the_secret_is_not_spoken_to() -> None:
    """It hears neither the secret nor a request."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as false:

        def serve() -> None:
            connection, _ = false.accept()
            with connection:
                connection.sendall(b"n" * 32)
                heard.append(connection.recv(1000))
                connection.sendall(b"p" * 32)
                heard.append(connection.recv(1000))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(dist.DistStoreError, match="another secret"):
            JobStore("127.0.0.1", false.getsockname()[1], SECRET, SECONDS)
        thread.join(10)
    assert len(heard[0]) == 64
    assert SECRET not in heard[0]
    assert heard[1] == b""


@pytest.mark.parametrize("request_", [[], [b"boom"], [b"get"], [b"get", b"soon", b"a"], [b"set", b"a"], [b"add", b"a", b"b"], [b"delete"]])
def test_what_is_no_request_ends_its_conversation_and_no_other(server: StoreServer, request_: list[bytes]) -> None:
    store, other = client(server), client(server)
    with pytest.raises(dist.DistError, match="is lost"):
        store._ask(*request_)
    other.set("a", "b")
    assert store.get("a") == b"b", "it connects anew"
