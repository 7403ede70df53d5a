"""Fuzz one of the two parsers with atheris: fuzz_streams.py policy|socketmap [options and folders of libFuzzer].

It needs atheris; the checks are in stream_checks.py. tests/fuzz/run runs it on both parsers for a given time.

Try again what the fuzzer has found:       fuzz_streams.py policy .venv-fuzz/findings/policy-crash-...
Take what it has learnt into the corpus:   fuzz_streams.py policy -merge=1 tests/fuzz/corpus/policy .venv-fuzz/learnt/policy
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

with atheris.instrument_imports(include=["mailcloak", "stream_checks"]):
    import stream_checks

    import mailcloak

STREAMS = {"policy": mailcloak.PolicyStream, "socketmap": mailcloak.SocketmapStream}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in STREAMS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(STREAMS)} [options and folders of libFuzzer]")
    stream_class = STREAMS[name]
    itself = shlex.join([sys.executable, *sys.argv[:2]])  # what libFuzzer puts into a shell's command line to merge or minimise
    atheris.Setup([itself, *sys.argv[2:]], lambda data: stream_checks.check(stream_class, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
