#!/usr/bin/env python3
"""mailcloak.py as the soak runs it: the same program, which also says what it holds in memory.

    python tests/soak_daemon.py MAILCLOAK_PY [ARGUMENT ...]

Each byte of standard input is answered on standard output with a line of JSON. Before that, garbage is collected, what is memoised is
forgotten, and the C library gives back what it keeps for later in the arenas of the threads, which grows until each has found its size.
So at rest two answers differ only by what has been left behind.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import gc
import importlib.util
import json
import os
import resource
import signal
import sys
import threading

garbage = 0
counting = threading.Lock()  # held while objects are counted and while mailcloak.py takes some out of the count (gc.freeze())


class Mallinfo2(ctypes.Structure):
    """Of all arenas, in bytes. Source: mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def forget_memoised():
    for value in gc.get_objects():
        if isinstance(value, functools._lru_cache_wrapper) and value.cache_parameters()["maxsize"]:
            value.cache_clear()
        elif type(value).__name__ == "BoundedMap":  # of mailcloak.py: rows and answers, bounded as well
            value.__init__(value._max_entries)
    gc.collect()


def count_entries(objects):
    """In all lists, dicts, sets and queues; the collector leaves out those that hold only texts and numbers."""
    containers = {}
    for value in objects:
        for each in (value, *gc.get_referents(value)):
            if isinstance(each, (list, dict, set, collections.deque)):
                containers[id(each)] = len(each)
    return sum(containers.values())


def held():
    """objects: that the collector knows, nearly all but texts and numbers.

    entries: of containers. blocks: of memory that Python's objects have, but for those of more than 512 bytes; some hundreds of them
    come and go. garbage: how many objects, so far, the collector has found only because it was told to look at all again. allocated_kib:
    what the C library has given out, also to SQLite. resident_kib: all of the process.
    """
    global garbage
    with counting:
        gc.collect()
        gc.unfreeze()
        garbage += gc.collect()
        forget_memoised()
        blocks = sys.getallocatedblocks()
        objects = gc.get_objects()
        found = {
            "objects": len(objects),
            "entries": count_entries(objects),
            "blocks": blocks,
            "allocated_kib": 0,
            "garbage": garbage,
        }
        del objects
    library = ctypes.CDLL(None)
    if hasattr(library, "mallinfo2"):  # glibc 2.33
        library.mallinfo2.restype = Mallinfo2
        memory = library.mallinfo2()
        found["allocated_kib"] = (memory.uordblks + memory.hblkhd) // 1024
        library.malloc_trim(0)
    with open("/proc/self/statm", "rb") as file:  # text would load a codec, which then counts
        found["resident_kib"] = int(file.read().split()[1]) * resource.getpagesize() // 1024
    return found


def answer():
    while os.read(0, 1):
        os.write(1, f"{json.dumps(held())}\n".encode())


def main():
    path, *arguments = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("mailcloak", path)
    sys.modules["mailcloak"] = program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    collect_garbage = program.collect_garbage

    def collect_garbage_between_counts():
        with counting:
            collect_garbage()

    program.collect_garbage = collect_garbage_between_counts
    signal.pthread_sigmask(signal.SIG_BLOCK, program.Daemon.SIGNALS)  # as it does itself, before its first thread
    threading.Thread(target=answer, daemon=True).start()
    return program.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
