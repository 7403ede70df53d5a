#!/usr/bin/env python3
"""The yardstick: a bare ThreadingUnixStreamServer that reads lines until an empty one and sends one constant answer.

bare.py SOCKET
"""

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


if __name__ == "__main__":
    with Server(sys.argv[1], Handler) as server:
        server.serve_forever()
