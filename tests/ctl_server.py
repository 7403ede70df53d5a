"""Runs mailcloakctl for run_ctl() of conftest.py: each command in a fork of one process that has loaded it.

Python's start and the imports are nearly all of a command's processor time, and the tests run hundreds of commands. All else is as in
a process of its own: standard streams, environment, folder, umask, exit code. Not the code of mailcloakctl.py below its main(), nor what
Python reads from the environment at its start: test_mailcloakctl.py has real processes for these.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_REQUEST_BYTES = 100_000  # well below what one message of such a socket may have


class CtlServer:
    """The process, and questions to it. It ends when the last copy of our end of the socket is closed."""

    def __init__(self):
        self._socket, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = its_end.fileno()
        self._process = subprocess.Popen([sys.executable, __file__, str(number)], pass_fds=[number], stdin=subprocess.DEVNULL)
        its_end.close()

    def run(self, arguments, *, stdin, stdout, stderr, timeout):
        """The exit code of mailcloakctl with these arguments and open files, as subprocess.call() returns it."""
        umask = os.umask(0)
        os.umask(umask)
        request = {"arguments": arguments, "cwd": os.getcwd(), "umask": umask, "environment": dict(os.environ)}
        mine, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.closing(mine):
            mine.settimeout(timeout)
            with contextlib.closing(its_end):
                files = [stdin.fileno(), stdout.fileno(), stderr.fileno(), its_end.fileno()]
                socket.send_fds(self._socket, [json.dumps(request).encode()], files)
            child = int(mine.recv(100))
            try:
                code = mine.recv(100)
            except socket.timeout:
                os.kill(child, signal.SIGKILL)
                raise subprocess.TimeoutExpired(["mailcloakctl", *arguments], timeout) from None
        assert code, f"mailcloakctl {arguments} was killed"
        return int(code)

    def close(self):
        self._socket.close()
        self._process.wait()


def serve(control):
    """Fork for each request until there are no more; nobody else waits for the forks."""
    while True:
        request, files, _, _ = socket.recv_fds(control, 2 * MAX_REQUEST_BYTES, 4)
        if not request:
            return
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            control.close()
            run(json.loads(request), files)
        for number in files:
            os.close(number)


def run(request, files):
    """Be mailcloakctl, and end as the interpreter does."""
    reply = socket.socket(fileno=files.pop())
    reply.send(str(os.getpid()).encode())
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    for target, number in enumerate(files):
        os.dup2(number, target)
        os.close(number)
    sys.argv[1:] = request["arguments"]
    import mailcloakctl

    try:
        code = mailcloakctl.main()
    except SystemExit as exc:
        code = exc.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    reply.send(str(code or 0).encode())
    os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import mailcloakctl  # noqa: F401  before the first fork

    serve(socket.socket(fileno=int(sys.argv[1])))
