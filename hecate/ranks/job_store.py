"""A key-value store over TCP for the launchers and ranks of one job: only those who hold the job's secret can talk to it.

torch's TCPStore takes orders from whoever reaches its port. This store sends a random number to whoever connects, and closes the connection
unless the answer proves that the other end holds the secret; nothing else that it says is read. From then on each message is signed
(HMAC-SHA256) together with its place in the conversation. Nothing is encrypted. A message is a list of byte strings, and none is unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from hecate.ranks.sockets import notice_lost_machine

_NONCE, _PROOF, _LENGTH = 32, 32, 4
"""The bytes of a random number, of a signature and of a length in the protocol."""
_LONGEST = 1 << 24
"""The most bytes that a message may have."""
_CONNECT_SECONDS = 60.0
"""How long a server may take to answer a client that connects."""
_ADMISSION_SECONDS, _MOST_STRANGERS = 5.0, 64
"""How long a connection may take to prove that it holds the secret, and how many may be about to. One more takes the place of the oldest,
so that strangers keep no member out by saying nothing."""


class StoreServer:
    """Holds the keys, and serves them at one address from threads of its own until the process ends."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        """
        Args:
            port: 0: any that is free.

        Raises:
            OSError: this process cannot listen there.
        """
        self._listening = socket.create_server((host, port), backlog=1024)
        self.host, self.port = host, int(self._listening.getsockname()[1])
        self._secret = secret
        self._lock = threading.Lock()
        self._values: dict[bytes, bytes] = {}
        self._waited_for: dict[bytes, threading.Event] = {}
        """For each key that somebody waits for, the event that is set once the key exists."""
        self._strangers: list[socket.socket] = []
        """The connections that have not proved yet that they hold the secret, the oldest first."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:  # the process has no more descriptors; some connections will end
                time.sleep(0.1)
                continue
            with self._lock:
                self._strangers.append(connection)
                if len(self._strangers) > _MOST_STRANGERS:
                    with suppress(OSError):
                        self._strangers.pop(0).shutdown(socket.SHUT_RDWR)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # A client that is lost, and one that sends what is no request, end this thread and its connection, never the server.
        with connection, suppress(OSError, ValueError, IndexError, TypeError, MemoryError):
            try:
                conversation = self._admit(connection)
            finally:
                with self._lock, suppress(ValueError):
                    self._strangers.remove(connection)
            while conversation is not None:
                conversation.send(self._answer(conversation.receive()))

    def _admit(self, connection: socket.socket) -> _Conversation | None:
        """Begin a conversation with whoever has connected; None: it does not hold the secret."""
        mine, deadline = secrets.token_bytes(_NONCE), time.monotonic() + _ADMISSION_SECONDS
        connection.settimeout(_ADMISSION_SECONDS)
        connection.sendall(mine)
        said = _read(connection, _NONCE + _PROOF, deadline)
        theirs, proof = said[:_NONCE], said[_NONCE:]
        if not hmac.compare_digest(proof, _sign(self._secret, b"client", mine, theirs)):
            return None
        connection.sendall(_sign(self._secret, b"server", mine, theirs))
        connection.settimeout(None)
        notice_lost_machine(connection)
        return _Conversation(connection, _sign(self._secret, b"conversation", mine, theirs), b"server", b"client")

    def _answer(self, request: Sequence[bytes]) -> list[bytes]:
        """Raises ValueError: the request is none."""
        name, *given = request
        if name == b"get":
            return self._get(float(given[0]), given[1:])
        with self._lock:
            if name == b"set":
                self._set(*given)
                return []
            if name == b"add":
                key, amount = given
                total = b"%d" % (int(self._values.get(key, b"0")) + int(amount))
                self._set(key, total)
                return [total]
            if name == b"delete":
                return [b"%d" % (self._values.pop(given[0], None) is not None)]
            if name == b"count":
                return [b"%d" % len(self._values)]
        raise ValueError(f"{name!r} is no request")

    def _set(self, key: bytes, value: bytes) -> None:
        self._values[key] = value
        if waiting := self._waited_for.pop(key, None):
            waiting.set()

    def _get(self, seconds: float, keys: Sequence[bytes]) -> list[bytes]:
        """The values of the keys, once all exist; [] if they do not within some seconds."""
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                missing = next((key for key in keys if key not in self._values), None)
                if missing is None:
                    return [self._values[key] for key in keys]
                # Under the lock: a `set` between the look and this line would wake nobody.
                exists = self._waited_for.setdefault(missing, threading.Event())
            if not exists.wait(deadline - time.monotonic()):
                return []


class JobStore(dist.Store):
    """The client of a `StoreServer`, which torch uses as its own stores. Any thread may use it.

    Every method raises `dist.DistError` if the server is lost.
    """

    def __init__(self, host: str, port: int, secret: bytes, timeout: timedelta) -> None:
        """
        Args:
            timeout: how long `get` and `wait` wait.

        Raises:
            DistError: nobody answers there, or not with this secret.
        """
        super().__init__()
        self.set_timeout(timeout)
        self._address, self._secret = (host, port), secret
        self._lock = threading.Lock()
        self._idle: list[_Conversation] = []
        self._give_back(self._connect())

    def set(self, key: str, value: str | bytes) -> None:  # type: ignore[override]
        self._ask(b"set", key.encode(), value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:  # type: ignore[override]
        return self._get(keys, self._limit())

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        self._get(keys, timeout or self._limit())

    def check(self, keys: Sequence[str]) -> bool:  # type: ignore[override]
        return not keys or bool(self._ask(b"get", b"0", *(key.encode() for key in keys)))

    def add(self, key: str, amount: int) -> int:  # type: ignore[override]
        return int(self._ask(b"add", key.encode(), b"%d" % amount)[0])

    def delete_key(self, key: str) -> bool:  # type: ignore[override]
        return self._ask(b"delete", key.encode()) == [b"1"]

    def num_keys(self) -> int:
        return int(self._ask(b"count")[0])

    def clone(self) -> JobStore:
        """This store itself: it may be used by several threads at once."""
        return self

    def _limit(self) -> timedelta:
        """What `set_timeout` has set, of this store or of a part of it that torch has made."""
        return self.timeout  # type: ignore[attr-defined, no-any-return]

    def _get(self, keys: Sequence[str], timeout: timedelta) -> list[bytes]:
        values = self._ask(b"get", b"%f" % timeout.total_seconds(), *(key.encode() for key in keys)) if keys else []
        if keys and not values:
            raise dist.DistStoreError(f"{', '.join(keys)}: nobody has set them within {timeout.total_seconds():.1f} s")
        return values

    def _ask(self, *request: bytes) -> list[bytes]:
        # A conversation belongs to one thread at a time: one may wait in `get` for minutes while another sets the key.
        with self._lock:
            conversation = self._idle.pop() if self._idle else None
        conversation = conversation or self._connect()
        try:
            conversation.send(request)
            answer = conversation.receive()
        except OSError as error:
            conversation.close()
            raise dist.DistNetworkError(f"the job's store at {self._address[0]}:{self._address[1]} is lost: {error}") from None
        self._give_back(conversation)
        return answer

    def _give_back(self, conversation: _Conversation) -> None:
        with self._lock:
            self._idle.append(conversation)

    def _connect(self) -> _Conversation:
        where, limit = f"the job's store at {self._address[0]}:{self._address[1]}", min(_CONNECT_SECONDS, self._limit().total_seconds())
        try:
            connection = socket.create_connection(self._address, limit)
        except OSError as error:
            raise dist.DistNetworkError(f"{where} does not answer: {error}") from None
        deadline = time.monotonic() + limit
        try:
            theirs, mine = _read(connection, _NONCE, deadline), secrets.token_bytes(_NONCE)
            connection.sendall(mine + _sign(self._secret, b"client", theirs, mine))
            proof = _read(connection, _PROOF, deadline)
        except OSError:
            proof = b""
        if not hmac.compare_digest(proof, _sign(self._secret, b"server", theirs, mine) if proof else b"-"):
            connection.close()
            raise dist.DistStoreError(f"{where} has another secret than this process")
        connection.settimeout(None)
        notice_lost_machine(connection)
        return _Conversation(connection, _sign(self._secret, b"conversation", theirs, mine), b"client", b"server")


class _Conversation:
    """A connection both ends of which have proved that they hold the secret."""

    def __init__(self, connection: socket.socket, key: bytes, own: bytes, other: bytes) -> None:
        self._connection, self._key = connection, key
        self._own, self._other = own, other
        self._sent = self._received = 0
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, fields: Sequence[bytes]) -> None:
        message = b"".join(len(field).to_bytes(_LENGTH, "little") + field for field in fields)
        self._sent += 1
        signature = _sign(self._key, self._own, b"%d" % self._sent, message)
        self._connection.sendall(len(message).to_bytes(_LENGTH, "little") + signature + message)

    def receive(self) -> list[bytes]:
        """Raises OSError: the other end is gone, or what has come was not signed by it."""
        head = _read(self._connection, _LENGTH + _PROOF)
        length, signature = int.from_bytes(head[:_LENGTH], "little"), head[_LENGTH:]
        if length > _LONGEST:
            raise ConnectionError("a message is too long")
        message = _read(self._connection, length)
        self._received += 1
        if not hmac.compare_digest(signature, _sign(self._key, self._other, b"%d" % self._received, message)):
            raise ConnectionError("a message was not signed by the other end")
        fields, at = [], 0
        while at < len(message):
            end = at + _LENGTH + int.from_bytes(message[at : at + _LENGTH], "little")
            fields.append(message[at + _LENGTH : end])
            at = end
        return fields

    def close(self) -> None:
        self._connection.close()


def _read(connection: socket.socket, count: int, deadline: float | None = None) -> bytes:
    """Raises OSError: the other end closes the connection before so many bytes, or has not sent them in time."""
    data = bytearray()
    while len(data) < count:
        if deadline is not None:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(min(1 << 20, count - len(data)))
        if not part:
            raise ConnectionError("the other end has closed the connection")
        data += part
    return bytes(data)


def _sign(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(hashlib.sha256(part).digest() for part in parts), "sha256").digest()
