"""postfix: messages per second through a private Postfix, beside the same Postfix that asks bare servers, and one that asks nobody."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from measure import (
    DOMAIN,
    OUTSIDE,
    Daemon,
    StandIn,
    bare_server,
    make_daemon,
    make_database,
    markdown_table,
    median_of,
    say,
    spread,
    verdict,
)
from results import Record, Section, at_least

# Beside the sample's own port, in the same Postfix: one that asks the bare servers all that the sample's port asks mailcloak, and one
# that asks nobody. And one that asks mailcloak as seldom as examples/postfix/main.cf says that it may.
POSTFIX_SERVICES = """\
127.0.0.1:{saving} inet n - y - - smtpd
  -o smtpd_reject_unlisted_recipient=no
  -o smtpd_sender_restrictions=reject_non_fqdn_sender
  -o {{ smtpd_recipient_restrictions = reject_non_fqdn_recipient, check_policy_service unix:private/mailcloak }}
127.0.0.1:{without} inet n - y - - smtpd
  -o cleanup_service_name=cleanup-without
  -o virtual_alias_maps=
  -o smtpd_sender_restrictions=reject_non_fqdn_sender
  -o smtpd_recipient_restrictions=reject_non_fqdn_recipient
127.0.0.1:{bare} inet n - y - - smtpd
  -o cleanup_service_name=cleanup-bare
  -o virtual_alias_maps=socketmap:unix:private/bare-map:alias
  -o {{ smtpd_sender_restrictions = reject_non_fqdn_sender, check_policy_service unix:private/bare-policy }}
  -o {{ smtpd_recipient_restrictions = reject_non_fqdn_recipient, check_policy_service unix:private/bare-policy }}
cleanup-without unix n - y - 0 cleanup
  -o virtual_alias_maps=
cleanup-bare unix n - y - 0 cleanup
  -o virtual_alias_maps=socketmap:unix:private/bare-map:alias
"""
USERS = 100
ALIASES = 3000
GOAL = 0.95  # of the messages per second with the bare servers
PORTS = ("without", "bare", "smtp", "saving")
ASK_MAILCLOAK = ("smtp", "saving")


class Errand(NamedTuple):
    """What smtp-source does."""

    title: str
    messages: int
    sessions: int
    recipients: int = 1


class Taken(NamedTuple):
    seconds: dict[tuple[str, str], list[float]]  # by errand and port, for each round
    questions: dict[tuple[str, str], Counter[str]]  # that mailcloak had, by errand and port, and by service
    rounds: int


def postfix(quick: bool) -> Section:
    from real.postfix import PATH, PrivatePostfix

    source = shutil.which("smtp-source", path=PATH)
    if os.geteuid() != 0 or not source or not shutil.which("postfix", path=PATH):
        say("postfix: LEFT OUT, its section stays as it is: this part needs root, postfix and smtp-source")
        return Section("")
    rounds, share = (2, 10) if quick else (5, 1)
    errands = [
        Errand("1 session", 400 // share, 1),
        Errand("20 sessions", 1000 // share, 20),
        Errand("1 session, 100 recipients a message", 20 // share, 1, 100),
    ]
    settings = {"virtual_transport": "discard:", "in_flow_delay": "0"}
    with contextlib.ExitStack() as stack:
        instance = PrivatePostfix(
            domains=(DOMAIN, "d2.test"), settings=settings, services=POSTFIX_SERVICES, ports=["without", "bare", "saving"]
        )
        stack.callback(instance.close)
        instance.start()
        keycloak = stack.enter_context(contextlib.closing(StandIn(USERS)))
        home = instance.directory / "mailcloak"
        home.mkdir()
        names = ["info", *(f"{n}info" for n in range(ALIASES))]  # those that smtp-source makes of info
        make_database(home / "state.db", ((f"{name}@{DOMAIN}", f"user{n % USERS}") for n, name in enumerate(names)))
        for path in (home, home / "state.db"):
            shutil.chown(path, "nobody")
        daemon = stack.enter_context(contextlib.closing(make_daemon(home, keycloak.config, instance.private, "nobody")))
        daemon.start()
        for name, arguments in (("bare-policy", ()), ("bare-map", ("map",))):
            bare = stack.enter_context(bare_server(instance.private / name, *arguments))
            shutil.chown(bare.path, "postfix")
        check_postfix(instance)
        taken = run_errands(source, instance, daemon, errands, rounds)
        version = instance.postconf("mail_version")
    shares = {errand: shares_of(taken, errand, "bare") for errand in errands}
    return Section(
        postfix_text(errands, taken, version),
        postfix_records(errands, taken),
        [at_least("postfix", errand.title, [statistics.median(each)], GOAL) for errand, each in shares.items()],
    )


def run_errands(source: str, instance: Any, daemon: Daemon, errands: Sequence[Errand], rounds: int) -> Taken:
    taken = Taken({}, {}, rounds)
    for number in range(rounds + 1):  # the first is not counted
        for errand in errands:
            for port in PORTS:
                before = questions_asked(daemon)
                seconds = send_messages(source, instance, errand, port)
                if not number:
                    continue
                taken.seconds.setdefault((errand.title, port), []).append(seconds)
                asked = questions_asked(daemon) - before
                if port in ASK_MAILCLOAK:
                    taken.questions.setdefault((errand.title, port), Counter()).update(asked)
                elif asked:
                    sys.exit(f"bench: the port {port!r} asked mailcloak: {asked}")
            if number:
                without, bare, rate, saving = (errand.messages / taken.seconds[errand.title, port][-1] for port in PORTS)
                rates = f"{rate:,.1f}/s, with less questions {saving:,.1f}/s, with the bare servers {bare:,.1f}/s, without {without:,.1f}/s"
                asked_each = questions_in_words(taken, errand, "smtp")
                say(f"postfix: round {number} of {rounds}, {errand.title}: {rates}; {asked_each} a recipient")
    return taken


def questions_asked(daemon: Daemon) -> Counter[str]:
    """How many questions Postfix has asked mailcloak so far, by service."""
    counts: Counter[str] = Counter()
    for each in json.loads(daemon.ask_map("stats *").partition(" ")[2])["answers"]:
        if each["reason"] != "stats":
            counts[each["service"]] += each["count"]
    return counts


def questions_in_words(taken: Taken, errand: Errand, port: str) -> str:
    rounds = len(taken.seconds[errand.title, port])
    counts = taken.questions[errand.title, port]
    return ", ".join(
        f"{service} {count / errand.messages / errand.recipients / rounds:.2f}" for service, count in sorted(counts.items())
    )


def shares_of(taken: Taken, errand: Errand, port: str, of: str = "smtp") -> list[float]:
    """In each round, messages per second with mailcloak, through the port "of", as a share of those through this port."""
    return [each / with_it for each, with_it in zip(taken.seconds[errand.title, port], taken.seconds[errand.title, of])]


def check_postfix(instance: Any) -> None:
    """See that each port asks the server it should ask: the mail goes where that server says."""
    found = {}
    for port in PORTS:
        (delivery,) = instance.deliveries(instance.send(OUTSIDE, f"1info@{DOMAIN}", port=port))
        found[port] = delivery.recipient
    expected = dict.fromkeys(ASK_MAILCLOAK, f"user2@{DOMAIN}")
    if found != {**expected, "bare": f"to-1info@{DOMAIN}", "without": f"1info@{DOMAIN}"}:
        sys.exit(f"bench: Postfix delivers elsewhere: {found}")


def send_messages(source: str, instance: Any, errand: Errand, port: str) -> float:
    """Seconds until smtp-source has got rid of all messages; then waits until Postfix has delivered them."""
    command = [source, "-s", str(errand.sessions), "-m", str(errand.messages), "-l", "2000", "-f", OUTSIDE, "-t", f"info@{DOMAIN}"]
    command += ["-r", str(errand.recipients)] if errand.recipients > 1 else ["-N"]
    started = time.monotonic()
    result = subprocess.run(
        [*command, f"inet:127.0.0.1:{instance.ports[port]}"], check=False, capture_output=True, text=True, timeout=120
    )
    seconds = time.monotonic() - started
    if result.returncode != 0:
        sys.exit(f"bench: smtp-source has failed: {result.stderr}{instance.log()[-2000:]}")
    deadline = time.monotonic() + 60
    while instance.queue():
        if time.monotonic() > deadline:
            sys.exit("bench: Postfix does not get its queue empty")
        time.sleep(0.1)
    return seconds


def postfix_records(errands: Sequence[Errand], taken: Taken) -> list[Record]:
    titles = {"smtp": "mailcloak", "saving": "mailcloak, less questions", "bare": "bare servers", "without": "nobody"}
    records = []
    for errand in errands:
        for port in PORTS:
            rate = median_of(errand.messages / each for each in taken.seconds[errand.title, port])
            share = statistics.median(shares_of(taken, errand, "bare", port)) if port in ASK_MAILCLOAK else None
            records.append(Record(f"Postfix asks {titles[port]}", errand.title, errand.sessions, rate, share))
    return records


def postfix_text(errands: Sequence[Errand], taken: Taken, version: str) -> str:
    lines = []
    for errand in errands:
        without, bare, with_it, _ = (taken.seconds[errand.title, port] for port in PORTS)
        shares = shares_of(taken, errand, "bare")
        median = statistics.median(shares)
        lines.append(
            [
                errand.title,
                errand.messages,
                *(spread([errand.messages / each for each in seconds], ",.1f") for seconds in (with_it, bare, without)),
                f"**{median:.1%}** ({min(shares):.1%} to {max(shares):.1%})",
                verdict(median >= GOAL),
                f"{statistics.median(shares_of(taken, errand, 'without')):.1%}",
                questions_in_words(taken, errand, "smtp"),
                *(f"{1000 * median_of(each) / errand.messages * errand.sessions:.2f}" for each in (with_it, bare, without)),
            ]
        )
    header = ["smtp-source", "messages", "messages/s", "with bare servers", "without", "share of bare", f"goal: {GOAL:.0%}"]
    header += ["share of without", "questions a recipient", "ms for each message", "bare", "without"]
    return f"""## Through Postfix

Postfix {version} with the settings of examples/postfix, in a separate instance, with discard as transport and in_flow_delay = 0. smtp-source
sends messages of 2,000 bytes, one session for each, to aliases that differ from message to message; {taken.rounds} rounds in turn, after one that
is not counted. "Bare servers": another port of the same Postfix, which asks bench/bare.py everything that the first port asks mailcloak: a
policy server that says DUNNO, and a map server in which each address leads to a mailbox, so that Postfix expands aliases here too. It shows
what Postfix itself needs to ask any server. "Without": a third port, with neither a policy service nor an alias map. The questions are those
that mailcloak counted. The figures are medians, with the smallest and the largest in brackets.

{markdown_table(header, lines)}
With less questions: one check_policy_service at the end of smtpd_recipient_restrictions, without policy_context, and
smtpd_reject_unlisted_recipient = no. examples/postfix/main.cf says what each of the two costs.

{saving_table(errands, taken)}"""


def saving_table(errands: Sequence[Errand], taken: Taken) -> str:
    lines = []
    for errand in errands:
        rates = [errand.messages / each for each in taken.seconds[errand.title, "saving"]]
        gain, share = (statistics.median(shares_of(taken, errand, port, "saving")) for port in ("smtp", "bare"))
        asked = questions_in_words(taken, errand, "saving")
        lines.append([errand.title, spread(rates, ",.1f"), f"{gain:.2f} times", f"{share:.1%}", asked])
    return markdown_table(["smtp-source", "messages/s", "of those above", "share of bare", "questions a recipient"], lines)
