"""count_garbage.py DIRECTORY WHAT: prints, as JSON, how many objects of each type 40 answers leave to the collector.

It runs in a process of its own, since what other tests have left running would be counted too. WHAT is one of
EXPECTED. The stand-in for Keycloak runs here as well.
"""

from __future__ import annotations

import collections
import gc
import json
import os
import pathlib
import sys
import time

from conftest import config_in, wait_until
from keycloak_stand_in import KeycloakStandIn

import mailcloak

EXPECTED = {
    "found": "primary,own-primary",
    "nobody": "unknown-recipient",
    "away": "directory-unavailable",
    "in the grace": "in-grace",
    "database": "database-unavailable",
}


def ask(service, what, number):
    name = f"nobody{number}" if what == "nobody" else f"u{number}"
    names = {"recipient": f"{name}@d1.test", "sender": f"{name}@d1.test", "sasl_username": name, "sasl_method": "PLAIN"}
    request = mailcloak.PolicyRequest(protocol_state="RCPT", **names)
    question = mailcloak.policy_question(request, service.policy)
    return service.answer(question, lambda facts: mailcloak.decide_policy(request, service.policy, facts))[0].reason


def ask_all(service, what):
    return {ask(service, what, number) for number in range(10, 50)}


def count(directory, keycloak, what):
    for number in range(10, 70):
        keycloak.add_user(f"u{number}", f"u{number}@d1.test", federationLink="ldap")
    policy = {"domain": "d1.test", "cache_ttl_seconds": 0.01, "negative_cache_ttl_seconds": 0.01}
    raw = config_in(directory, keycloak=keycloak.config(), policy=policy)
    mailcloak.prepare_database(raw["sqlite"]["path"], 2)
    blocks = {name: mailcloak.read_block(cls, name, raw.get(name, {}), []) for name, cls in mailcloak._BLOCKS.items()}
    service = mailcloak.Service(mailcloak.Config(path="", static_users=None, **blocks))
    if what == "in the grace":
        assert ask_all(service, what) == {EXPECTED["found"]}
        keycloak.users = [user for user in keycloak.users if user["username"] >= "u5"]
        time.sleep(0.05)
    if what == "away":
        keycloak.fault = "status-503"
        wait_until(lambda: ask(service, what, 10) == EXPECTED[what] and service.source.outage.established, what="outage")
    if what == "database":
        os.truncate(raw["sqlite"]["path"], 5000)
    ask(service, what, 10)
    if what != "away":  # what the first probe leaves behind is no answer's
        wait_until(lambda: ("profile", {}) in keycloak.requests, what="the first probe")
    time.sleep(0.3)
    gc.collect()
    gc.disable()
    assert ask_all(service, what) == {EXPECTED[what]}
    time.sleep(0.3)
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    return dict(collections.Counter(type(left).__name__ for left in gc.garbage))


def main():
    keycloak = KeycloakStandIn()
    keycloak.start()
    print(json.dumps(count(pathlib.Path(sys.argv[1]), keycloak, sys.argv[2])), flush=True)
    os._exit(0)  # the threads of the service and of the stand-in go with the process


if __name__ == "__main__":
    main()
