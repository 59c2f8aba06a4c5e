"""Where the nodes of a job meet, and by which address and network interface other nodes reach this one."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import time
from dataclasses import dataclass

from hecate.errors import UserError
from hecate.io.terminal import PROGRESS

DEFAULT_PORT = 29400
_SIOCGIFADDR = 0x8915
_START_SECONDS = 300.0
"""how long a node waits for the node that hosts the meeting point to be started"""


@dataclass(frozen=True)
class Endpoint:
    """The meeting point of a job's nodes, seen from one of them."""

    host: str
    port: int
    local_address: str
    """the address of this node on the route to the meeting point"""
    interface: str | None
    """the name of this node's interface with the local address; None: unknown"""
    on_this_node: bool
    """whether this node hosts the meeting point"""


def find_endpoint(text: str) -> Endpoint:
    """Find the meeting point that a user has named as HOST:PORT, or as HOST with the usual port.

    Raises:
        UserError: the text has another form, the host is unknown, or no route leads to it.
    """
    host, colon, number = text.rpartition(":")
    if not colon:
        host, number = text, str(DEFAULT_PORT)
    if not host or not number.isdigit() or not 0 < int(number) < 65536:
        raise UserError(f"--rdzv-endpoint {text!r}: must be HOST:PORT of one of the nodes, the same on all\n  for example 10.0.0.1:29400")
    try:
        address = socket.getaddrinfo(host, int(number), socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise UserError(f"--rdzv-endpoint {text}: the host {host} is unknown: {error.strerror}\n  give its numerical address") from None
    assert isinstance(address, str)
    if ipaddress.ip_address(address).is_loopback and host not in ("localhost", address):
        raise UserError(
            f"--rdzv-endpoint {text}: on this node {host} is {address}, as /etc/hosts says, which no other node reaches\n"
            "  give its numerical address"
        )
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, int(number)))  # this reads the routing table and sends nothing
            local = probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"--rdzv-endpoint {text}: no route leads to {address} from this node: {error.strerror}") from None
    return Endpoint(address, int(number), local, interface_of(local), _is_local(address))


def interface_of(address: str) -> str | None:
    """The name of this node's network interface with an IPv4 address; None: there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # the interface has no IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def wait_for(endpoint: Endpoint, limit_seconds: float = _START_SECONDS) -> None:
    """Wait until the node at the meeting point answers.

    Raises:
        UserError: it does not answer within the limit.
    """
    deadline, printed, reason = time.monotonic() + limit_seconds, False, ""
    while True:
        try:
            socket.create_connection((endpoint.host, endpoint.port), timeout=2.0).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise UserError(
                f"--rdzv-endpoint {endpoint.host}:{endpoint.port}: no answer for {limit_seconds:.0f} s ({reason})\n"
                "  start the same command on the node that has this address; if it runs, a firewall may be between the two nodes"
            )
        if not printed:
            PROGRESS.info(f"hecate: waiting for {endpoint.host}:{endpoint.port}")
            printed = True
        time.sleep(0.5)


def _is_local(address: str) -> bool:
    if ipaddress.ip_address(address).is_loopback:
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
        return True
