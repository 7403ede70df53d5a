#!/usr/bin/env python3
"""The tests' stand-in for Keycloak as a process of its own, quick however many users it has.

stand_in.py USERS LATENCY_SECONDS

It knows user0@bench.test and so on. Prints a keycloak block for a configuration as a line of JSON; for each line of standard input then
how many requests of each kind it has had so far; and ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from keycloak_stand_in import KeycloakStandIn


class IndexedStandIn(KeycloakStandIn):
    """The stand-in with two dicts in place of its walk over all users."""

    def index(self) -> None:
        self.by_value = {(name, user[name].lower()): user for user in self.users for name in ("username", "email") if name in user}

    def search(self, query):
        keys = [(name, query[name].lower()) for name in ("username", "email") if query.get(name)]
        if query.get("exact") != "true" or not keys:
            return super().search(query)
        users = [self.by_value[keys[0]]] if keys[0] in self.by_value else []
        few = SimpleNamespace(users=users, ignore_exact=False, empty_value_finds_all=self.empty_value_finds_all)
        return KeycloakStandIn.search(few, query)

    def counts(self) -> dict[str, int]:
        kinds = Counter("self-check" if query.get("max") == "1" else kind for kind, query in self.requests)
        return {kind: kinds[kind] for kind in ("users", "self-check", "profile", "token")}


def main() -> None:
    stand_in = IndexedStandIn()
    for number in range(int(sys.argv[1])):
        stand_in.add_user(f"user{number}", f"user{number}@bench.test")
    stand_in.index()
    stand_in.latency_seconds = float(sys.argv[2])
    with stand_in:
        print(json.dumps(stand_in.config()), flush=True)
        for _ in sys.stdin:
            print(json.dumps(stand_in.counts()), flush=True)


if __name__ == "__main__":
    main()
