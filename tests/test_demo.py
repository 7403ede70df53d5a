"""What "make demo" shows: each answer beside where it came from."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

ROWS = {
    "mail for a user, ": "directory: a user's primary e-mail",
    "mail for an alias, ": "SQLite: an enabled alias",
    "mail for an unknown user, ": "neither SQLite nor the directory",
    "alice sends as her alias ": "SQLite: the alias belongs to the user",
    "a client without a login ": "our own domain, and no login",
    "where does bob@demo.test lead?": "SQLite: no such alias",
}


def test_each_answer_stands_beside_its_own_source():
    """A thread writes the log from which it is read, some time after the answer."""
    result = subprocess.run([sys.executable, ROOT / "demo/demo.py"], capture_output=True, text=True, timeout=100, check=True)
    for question, source in ROWS.items():
        (row,) = [line for line in result.stdout.splitlines() if line.startswith(question)]
        assert row.endswith(f"  {source}")
    assert "13 of 13 answers are as they should be" in result.stdout
