"""The process that a launcher starts for a rank. It has the fork server fork the rank, passes signals on to it, and ends as the rank ends.

It is run by its path and imports only the standard library, so that it starts at once: forked_rank.py SOCKET PROGRAM ARGUMENTS...
"""

import contextlib
import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    path, program, *arguments = sys.argv[1:]
    answer = ""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until the server is connected
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        try:
            server.connect(path)
        except OSError:  # the server has ended, so this process becomes the rank, which takes longer
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
            os.execv(sys.executable, [sys.executable, "-P", "-m", program, *arguments])
        order = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(server, [len(order).to_bytes(8, "little")], [0, 1, 2])
        server.sendall(order)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _frame: server.send(bytes([number])))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        with contextlib.suppress(ConnectionError):
            answer = server.makefile("r").readline()
    if not answer:
        print("hecate: the process that the ranks are forked from has ended", file=sys.stderr)
        return 1
    status = int(answer)
    if status < 0:  # killed by a signal: this process ends by it, too, so that the launcher sees how the rank has ended
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main())
