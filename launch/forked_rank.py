"""A rank as whoever launched it sees it: asks the fork server for the process that is the rank, hands signals on to it, ends as it ends.

Run by path, with the standard library alone, so that it is there at once: forked_rank.py SOCKET ARGUMENTS...
"""

import contextlib
import json
import os
import signal
import socket
import sys

HANDED_ON = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    path, *arguments = sys.argv[1:]
    answer = ""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)  # until there is someone to hand them on to
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        try:
            server.connect(path)
        except OSError:  # it has ended: be the rank, if a slower one
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
            os.execv(sys.executable, [sys.executable, "-m", "hecate", *arguments])
        order = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(server, [len(order).to_bytes(8, "little")], [0, 1, 2])
        server.sendall(order)
        for number in HANDED_ON:
            signal.signal(number, lambda number, _frame: server.send(bytes([number])))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
        with contextlib.suppress(ConnectionError):
            answer = server.makefile("r").readline()
    if not answer:
        print("hecate: the process that ranks are forked from has ended", file=sys.stderr)
        return 1
    status = int(answer)
    if status < 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main())
