#!/usr/bin/env python3
"""The yardstick: a bare ThreadingUnixStreamServer that takes a request and sends an answer, and knows nothing.

bare.py SOCKET                    policy: reads lines until an empty one, and sends one constant answer
bare.py SOCKET map                socketmap: reads a netstring, and says that KEY leads to to-KEY, and that to-KEY leads nowhere
bare.py SOCKET COUNT stat|statx   policy, with this many more system calls for each answer: os.stat releases Python's global lock,
                                  statx keeps it
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


class MapHandler(socketserver.StreamRequestHandler):
    """Each key is an alias with a mailbox of its own, so that Postfix expands it as it expands those of mailcloak."""

    def handle(self):
        while True:
            length = b""
            while (byte := self.rfile.read(1)) not in (b":", b""):
                length += byte
            if not byte:
                return
            _, _, key = self.rfile.read(int(length) + 1)[:-1].partition(b" ")
            answer = b"NOTFOUND " if key.startswith(b"to-") else b"OK to-" + key
            self.wfile.write(b"%d:%s," % (len(answer), answer))


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def more_system_calls(count, name):
    """A handler class whose answers cost this many more."""
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


def handler_class(arguments):
    if arguments == ["map"]:
        return MapHandler
    return more_system_calls(int(arguments[0]), arguments[1]) if arguments else Handler


if __name__ == "__main__":
    with Server(sys.argv[1], handler_class(sys.argv[2:])) as server:
        server.serve_forever()
