#!/usr/bin/env python3
"""The yardstick: a bare ThreadingUnixStreamServer that reads lines until an empty one and sends one constant answer.

bare.py SOCKET
bare.py SOCKET COUNT stat|statx   with so many more system calls an answer: os.stat gives up Python's global lock, statx by ctypes keeps it
"""

import ctypes
import os
import socketserver
import sys

ANSWER = b"action=DUNNO\n\n"


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"\n":
                self.wfile.write(ANSWER)


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def more_system_calls(count, name):
    """A handler class whose answers cost so many more."""
    status, statx = ctypes.create_string_buffer(256), ctypes.PyDLL(None).statx
    call = {"stat": lambda: os.stat("/"), "statx": lambda: statx(-100, b"/", 0, 0x180, status)}[name]

    class WithMore(Handler):
        def handle(self):
            for line in self.rfile:
                if line == b"\n":
                    for _ in range(count):
                        call()
                    self.wfile.write(ANSWER)

    return WithMore


if __name__ == "__main__":
    with Server(sys.argv[1], more_system_calls(int(sys.argv[2]), sys.argv[3]) if sys.argv[2:] else Handler) as server:
        server.serve_forever()
