# mailcloakask: questions to the running daemon. MIT licence, see LICENSE.
"""Ask the running daemon: what these commands of mailcloakctl run, and what others load that look a name up in Keycloak.

  ask recipient ADDRESS    may mail for it come in, and where does it lead?
  ask sender ADDRESS       may a client use it as sender? --user and --method say who has logged in, and how
  ask alias ADDRESS        where does it lead?
  status                   the daemon's statistics, as text, with --json or --prometheus; --watch shows them again and again
  flush [ADDRESS]          lets the daemon forget which users it has cached

An answer is the daemon's own, over the two sockets that Postfix asks too. The statistics are its map "stats", for all who may connect.
The reasons are "explain", and "flush" forgets: both are for root, for the daemon's own user and for the sockets' owner.

Contents: the running daemon, ask, status and flush.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Optional

import mailcloak
import mailcloakcommon as common

MAX_ANSWER_BYTES = 16 * 1024 * 1024  # of the daemon; its statistics are about 10 kB
MAX_ASKED_CHARS = 2000  # of an address to ask about; an SMTP line of Postfix holds 2048 (line_length_limit)
OPENRC_SETTINGS = "/etc/conf.d/mailcloak"

# ---------------------------------------------------------------------------------------------------------------------------------
# The running daemon
# Its two sockets, asked as Postfix asks them. Whatever goes wrong is a Refused that names the way out; no wait is longer than the
# time given. What the daemon tells of itself is read as it stands, by a function given to ask_json, which lets only a daemon of this
# very version through, and says so where the function fails.
# ---------------------------------------------------------------------------------------------------------------------------------


class NotAllowed(common.Refused):
    """The daemon says that this user may not ask for that."""


class NoAnswer(common.Refused):
    """The daemon was asked and has not answered; it may have done what it was asked all the same."""


class OtherVersion(common.Refused):
    """The running daemon is of another version than this program, so its statistics and explanations cannot be read."""


def where_log(daemon: Optional[mailcloak.DaemonConfig]) -> str:
    """How to read the daemon's log on this host; daemon is that block of the configuration. Source: mailcloak(8), DIAGNOSTICS."""
    if daemon and daemon.log == "syslog":
        return "lines of mailcloak in the host's log of mail"
    if os.path.isdir("/run/systemd/system"):
        return "journalctl -u mailcloak"
    with contextlib.suppress(OSError), open(OPENRC_SETTINGS, encoding="utf-8", errors="replace") as file:
        if named := re.search(r"^mailcloak_log=[\"']?([^\"'\s]+)", file.read(), re.MULTILINE):
            return named[1]
    return "/var/log/mailcloak.log, or where its standard error goes"


class RunningDaemon:
    """Questions to the daemon, each over a connection of its own; log says where its log is."""

    def __init__(self, sockets: mailcloak.SocketsConfig, seconds: float, log: str) -> None:
        self.sockets, self._seconds, self.log = sockets, seconds, log

    def ask_policy(self, **attributes: str) -> str:
        """The answer of the policy service, such as "550 5.1.1 No such user". Source: SMTPD_POLICY_README."""
        lines = "".join(f"{name}={value}\n" for name, value in {"request": "smtpd_access_policy", **attributes}.items())
        path = self.sockets.policy_socket
        answer = self._exchange(path, lines.encode() + b"\n", self._read_policy_answer)
        if not answer.startswith("action="):
            raise senseless_answer(path)
        return answer[len("action=") :]

    def ask_map(self, name: str, key: str) -> tuple[str, str]:
        """The status and the text of a map's answer, such as ("OK", "alice@example.org"). Source: socketmap_table(5)."""
        query = mailcloak.encode_netstring(f"{name} {key}".encode())
        path = self.sockets.socketmap_socket
        status, _, text = self._exchange(path, query, self._read_netstring).partition(" ")
        if status not in ("OK", "NOTFOUND", "TEMP", "PERM"):
            raise senseless_answer(path)
        return status, text

    def ask_json(self, name: str, key: str, read: Callable[[dict[str, Any]], common.Result]) -> common.Result:
        """What read() makes of the object with which the daemon's map "stats" or "explain" answers.

        Raises NotAllowed where the daemon says that this user may not ask, OtherVersion where it is not of this version.
        """

        def read_own(value: dict[str, Any]) -> common.Result:
            theirs = value.get("version", "unknown")
            if theirs != mailcloak.__version__:
                raise OtherVersion(f"the running daemon is version {theirs}, this is {mailcloak.__version__}", "restart it")
            return read(value)

        return self._ask_object(name, key, read_own)

    def flush(self, key: str) -> int:
        """Let the daemon forget what it has cached of one user, or of all ("*"); how many cached answers these were."""
        try:
            return self._ask_object("flush", key, lambda value: int(value["forgotten"]))
        except NoAnswer as exc:
            text = f"{exc.text}; the flush may be done all the same"
            raise common.Refused(text, f"repeat it; if there is no answer again, {exc.remedy}") from exc

    def _ask_object(self, name: str, key: str, read: Callable[[dict[str, Any]], common.Result]) -> common.Result:
        """What read() makes of the object in the answer. Whatever it does not find there, another program has answered."""
        status, text = self.ask_map(name, key)
        if status == "PERM" and (text.startswith("unknown map") or text in ("no key", "not a question")):
            raise OtherVersion(f"the running daemon does not understand {name!r} ({text}): it is of another version", "restart it")
        if status == "PERM":
            owner = common.owner_name(self.sockets.socketmap_socket)
            raise NotAllowed(f"the daemon says: {text}", f"run mailcloakctl as root, as the daemon's own user or as {owner}")
        if status == "TEMP":
            raise common.Refused(f"the daemon says: {text}", f"its log ({self.log}) says why")
        try:
            return read(json.loads(text if status == "OK" else ""))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as exc:
            raise senseless_answer(self.sockets.socketmap_socket) from exc

    # ---- one exchange

    def _exchange(self, path: str, question: bytes, read: Callable[[bytes], Optional[bytes]]) -> str:
        deadline = time.monotonic() + self._seconds
        answer = b""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            try:
                connection.settimeout(self._seconds)
                connection.connect(path)
                connection.sendall(question)
                while True:
                    connection.settimeout(max(0.001, deadline - time.monotonic()))
                    data = connection.recv(64 * 1024)
                    answer += data
                    whole = read(answer)
                    if whole is not None:
                        return whole.decode("utf-8", "replace")
                    if not data:
                        closed = f"the daemon at {path} closed the connection without an answer"
                        raise NoAnswer(closed, f"its log ({self.log}) says why, or something else listens there")
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise senseless_answer(path)
            except socket.timeout:
                late = f"no answer at {path} within {self._seconds:.0f} s"
                raise NoAnswer(late, f"look at its log ({self.log}), and restart it") from None
            except ValueError:
                raise senseless_answer(path) from None
            except OSError as exc:
                raise self._failed_connection(path, exc) from exc

    def _failed_connection(self, path: str, exc: OSError) -> common.Refused:
        """Why the daemon cannot be asked at that path, and what to do."""
        if exc.errno in (errno.ENOENT, errno.ECONNREFUSED):
            gone = "there is no socket" if exc.errno == errno.ENOENT else "nobody listens"
            start = "start it (rc-service mailcloak start, systemctl start mailcloak), or name its configuration with --config"
            return common.Refused(f"{gone} at {path}: the daemon is not running, or runs with another configuration", start)
        if exc.errno in (errno.EACCES, errno.EPERM):
            return common.Refused(f"this user may not connect to {path}", "run mailcloakctl as root")
        return common.Refused(f"{path}: {exc.strerror or exc}", f"look at its log ({self.log}), and restart it")

    @staticmethod
    def _read_policy_answer(data: bytes) -> Optional[bytes]:
        answer, end, _ = data.partition(b"\n\n")
        return answer if end else None

    @staticmethod
    def _read_netstring(data: bytes) -> Optional[bytes]:
        """The payload, None while it is not whole; raises ValueError for what is no netstring."""
        digits, colon, rest = data.partition(b":")
        if not re.fullmatch(rb"[0-9]{0,9}", digits) or (colon and not digits):
            raise ValueError
        if not colon or len(rest) <= int(digits):
            return None
        length = int(digits)
        if rest[length : length + 1] != b",":
            raise ValueError
        return rest[:length]


def senseless_answer(path: str) -> common.Refused:
    """The answer is not of the form in which the daemon answers."""
    remedy = "something else listens there, or a daemon of another version: restart it"
    return common.Refused(f"the answer at {path} makes no sense", remedy)


# ---------------------------------------------------------------------------------------------------------------------------------
# ask: what the daemon answers, and why
# The answer is the one that Postfix gets to the same question. Reason, rule and change come from the daemon's map "explain", in the
# sentences of the table REASONS of mailcloak.py.
# ---------------------------------------------------------------------------------------------------------------------------------

# The first word of an answer, in plain words, and its colour on a terminal.
ANSWERS = {
    "DUNNO": ("no objection", common.GREEN),
    "550": ("refused for good", common.RED),
    "553": ("refused for good", common.RED),
    "451": ("deferred, the other side tries again", common.YELLOW),
    "OK": ("its mail goes there", common.GREEN),
    "NOTFOUND": ("no alias leads it elsewhere", common.GREEN),
    "TEMP": ("Postfix defers the mail", common.YELLOW),
    "PERM": ("Postfix cannot ask this", common.RED),
}
SOURCES = {
    "database": "database",
    "cache": "cached",
    "keycloak": "Keycloak",
    "outage": "cached, used in an outage",
    "static": "static_users",
}


def ask_recipient(context: common.Context) -> None:
    """May mail for an address come in, and where does it lead?"""
    address = read_asked_address(context.options.address)
    if not address:
        raise common.Refused("'<>' receives no mail; name an address")
    question = {"protocol_state": "RCPT", "policy_context": "recipient", "recipient": address}
    explanation = explain(context, {"policy": question})
    answer = context.daemon.ask_policy(**question)
    leads_to = None
    if answer == "DUNNO":
        status, text = context.daemon.ask_map("alias", address)
        leads_to = {"OK": text, "NOTFOUND": None}.get(status, f"{status} {text}")
    show_answer(context, f"may mail for <{address}> come in?", answer, leads_to, describe(explanation, answer, address))


def ask_sender(context: common.Context) -> None:
    """May a client, logged in or not, use a sender?"""
    options = context.options
    address, user = read_asked_address(options.address), common.read_username(options.user) if options.user else ""
    method = read_method(options.method or "PLAIN") if user else ""
    question = {"protocol_state": "RCPT", "policy_context": "sender", "sender": address}
    question |= {"sasl_username": user, "sasl_method": method}
    explanation = explain(context, {"policy": question})
    if user and not options.method and is_no_app(explanation.get("steps", [])):
        method = question["sasl_method"] = "XOAUTH2"  # the only way for a user to log in
        explanation = explain(context, {"policy": question})
    answer = context.daemon.ask_policy(**question)
    who = f"{user}, logged in by {method}," if user else "a client who has not logged in"
    show_answer(context, f"may {who} send as <{address}>?", answer, None, describe(explanation, answer, address))


def is_no_app(steps: Sequence[dict[str, Any]]) -> bool:
    """Did the daemon look for an app on the way to its answer, and find none?"""
    return any(step["asked"] == "app" and not step["found"] and not step["error"] for step in steps)


def ask_alias(context: common.Context) -> None:
    """Where does an address lead?"""
    address = read_asked_address(context.options.address)
    if not address:
        raise common.Refused("'<>' is no alias; name an address")
    explanation = explain(context, {"alias": address})
    answer = " ".join(context.daemon.ask_map("alias", address)).rstrip()
    show_answer(context, f"where does <{address}> lead?", answer, None, describe(explanation, answer, address))


def read_asked_address(text: str) -> str:
    """An address as it stands in an SMTP envelope, with or without its angle brackets; "" is the null sender."""
    address = text[1:-1] if text.startswith("<") and text.endswith(">") else text
    if not address.isprintable() or len(address) > MAX_ASKED_CHARS:
        raise common.Refused(
            f"{text[:100]!r} is not an address that Postfix can ask about: it is too long or holds control characters"
        )
    return address


def read_method(text: str) -> str:
    """The name of a SASL mechanism, in the form in which Postfix sends it."""
    if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", text):
        raise common.Refused(f"{text!r} is not a SASL mechanism such as PLAIN or XOAUTH2")
    return text.upper()


def explain(context: common.Context, question: dict[str, Any]) -> dict[str, Any]:
    """What the daemon's map "explain" says, or a note why it does not. Asked before the answer, which would fill the cache."""
    try:
        return context.daemon.ask_json("explain", json.dumps(question), read_explanation)
    except NotAllowed as exc:
        return {"note": f"the reason is told only to root, to the daemon's own user and to the sockets' owner ({exc})"}
    except common.Refused as exc:
        return {"note": f"the reason cannot be told: {exc}"}


def read_explanation(value: dict[str, Any]) -> dict[str, Any]:
    """What is shown of an explanation; each step was described once, so that it can be described later."""
    for step in value["steps"]:
        describe_step(step)
    texts = {name: common.real_paths(str(value[name])) for name in ("answer", "reason", "rule", "change")}
    return {**texts, "steps": value["steps"]}


def describe(explanation: dict[str, Any], answer: str, address: str) -> dict[str, Any]:
    """The daemon's explanation of an answer: reason, rule, change, steps; and a note where something is odd."""
    if "note" in explanation:
        return {"note": explanation["note"], "steps": []}
    shown = {name: explanation[name] for name in ("reason", "rule", "change", "steps")}
    if address and "@" not in address:
        shown["change"] = "ask for it with its domain: Postfix appends $myorigin to an address that has none"
    explained = explanation["answer"].rstrip()
    if explained != answer:
        shown["note"] = (
            f"the answer to the very same question was {explained} a moment before: something has just changed, ask again"
        )
    return shown


def show_answer(context: common.Context, asked: str, answer: str, leads_to: Optional[str], why: dict[str, Any]) -> None:
    """Print the daemon's answer, and why: as far as the daemon tells this user."""
    shown = {"asked": asked, "answer": answer, "leads_to": leads_to, **why}
    if context.options.json:
        common.print_json(shown)
        return
    meaning, colour = ANSWERS.get(answer.partition(" ")[0], ("", common.BOLD))
    common.print_field("question", asked)
    print(f"{'answer':<15}{common.paint(common.shown_text(f'{answer} ({meaning})' if meaning else answer), colour)}")
    for name in ("leads_to", "note", "reason", "rule", "change"):
        if shown.get(name):
            common.print_field(name.replace("_", " "), shown[name])
    steps = dict.fromkeys(reversed([describe_step(step) for step in why["steps"]]))  # if asked twice, only the last is shown
    table = [["", "ASKED", "FOUND", "FROM"]]
    table += [[f"{index}.", *map(common.shown_text, step)] for index, step in enumerate(reversed(list(steps)), 1)]
    common.print_table(table)


def describe_step(step: dict[str, Any]) -> tuple[str, str, str]:
    """What was asked, what was found and where, in words."""
    asked = {
        "alias": "is there an alias",
        "app": "is there an app",
        "holders": "whose e-mail is",
        "leaver": "has the user left:",
        "login": "whose login is",
        "user": "is there a user",
    }
    source, where = step["source"], SOURCES.get(step["source"], "-")
    if source in ("cache", "outage"):
        where += f", {common.shown_seconds(step['age_seconds'])} old"
    elif source == "keycloak":
        where += ", just now"
    found = f"no answer: {step['error']}" if step["error"] else describe_found(step["asked"], step["found"])
    return f"{asked[step['asked']]} {step['value']}", found, where


def describe_found(kind: str, found: Any) -> str:
    """A fact in words: that of a step which asked for this kind."""
    if kind == "leaver":
        return "yes, gone or disabled" if found else "no"
    if kind == "holders":
        return ", ".join(map(describe_holder, found)) or "nobody's"
    if found is None:
        return "no"
    if kind == "alias":
        alias = mailcloak.Alias(**found)
        return f"leads to {common.shown_targets(alias)}{', and only receives' if alias.receive_only else ''}{'' if alias.enabled else ', but is disabled'}"
    if kind == "app":
        may = "may use the sender" if found["may_send"] else "may not use the sender"
        return f"{found['state']}, {may}" + (f", owner {found['owner']}" if found["owner"] else "")
    return f"{found['username']}, enabled" if found["state"] == "enabled" else str(found["state"])


def describe_holder(user: dict[str, Any]) -> str:
    """A user who has the address, in words."""
    state = "enabled" if user["enabled"] else "locked out" if user["locked_out"] else "disabled"
    return f"{user['username']}, {state}{', federated' if user['federation'] else ''}"


# ---------------------------------------------------------------------------------------------------------------------------------
# status and flush
# ---------------------------------------------------------------------------------------------------------------------------------


def show_status(context: common.Context) -> None:
    """Print the daemon's statistics, as text or JSON, or write them for Prometheus; or print them again and again."""
    options = context.options
    if options.prometheus:
        write_metrics(context, options.prometheus)
    elif options.watch:
        watch_status(context)
    elif options.json:
        replication = context.replication()
        common.print_json(
            context.daemon.ask_json("stats", "*", lambda stats: {**stats, "replication": replication} if replication else stats)
        )
    else:
        print("\n".join(ask_status(context, common.terminal_width())))


def ask_status(context: common.Context, width: Optional[int]) -> list[str]:
    """The daemon's statistics as lines for people."""
    daemon, replication = context.daemon, context.replication()
    return daemon.ask_json("stats", "*", lambda stats: format_status(stats, width, daemon.log, replication))


def watch_status(context: common.Context) -> None:
    """Show the status again and again in the same place, until Ctrl-C, also while the daemon is restarted."""
    if not sys.stdout.isatty():
        raise common.Refused("--watch needs a terminal; --json and --prometheus are for programs")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            width, height = shutil.get_terminal_size()
            try:
                lines = ask_status(context, width)
            except common.Refused as exc:
                lines = [common.paint(line, common.RED) for line in common.wrap(common.shown_text(exc), width)]
            lines = [time.strftime(f"%H:%M:%S, every {common.WATCH_SECONDS:.0f} s, Ctrl-C ends it"), "", *lines]
            if len(lines) >= height:
                lines = [*lines[: height - 2], f"({len(lines) - height + 2} more lines)"]
            # home, each line and what was behind it, then all that was below
            print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
            time.sleep(common.WATCH_SECONDS)


def format_status(stats: dict[str, Any], width: Optional[int], log: str, replication: Optional[dict[str, Any]] = None) -> list[str]:
    """Statistics as lines; log says where the daemon's log is, replication what read_replication() does."""
    head = f"mailcloak {stats['version']}, pid {stats['pid']}, up {common.shown_seconds(stats['uptime_seconds'])}"
    lines = [common.paint(common.shown_text(head), common.BOLD)]
    for label, text, colour in (*status_fields(stats, log), *replication_fields(replication)):
        first, *rest = common.hang(f"{label:<15}", text, width)
        lines += [first[:15] + common.paint(first[15:], colour), *rest]
    table = [["SERVICE", "ANSWER", "COUNT", "REASON"]]
    for answer in sorted(stats["answers"], key=lambda answer: -answer["count"]):
        table.append([common.shown_text(answer[name]) for name in ("service", "answer", "count", "reason")])
    return [*lines, "", *common.format_table(table, width)] if len(table) > 1 else lines


def status_fields(stats: dict[str, Any], log: str) -> Iterator[tuple[str, str, str]]:
    """Label, text and colour ("" for none) of each line."""
    reload = stats["last_reload"]
    read_at = (
        f"reloaded {common.shown_time(reload['at'])}" if reload else f"read at start, {common.shown_time(stats['started_at'])}"
    )
    refused = bool(reload) and not reload["ok"]
    text = f"{stats['config']}, {read_at}{': refused, the one before it is in force' if refused else ''}"
    yield "configuration", text, common.RED if refused else ""
    yield ("Keycloak", *describe_keycloak(stats["keycloak"]))
    database, connections = stats["database"], stats["connections"]
    works = "works" if database["works"] else "cannot be used"
    yield "database", f"{database['path']}, {works}", "" if database["works"] else common.RED
    open_now = ", ".join(f"{name} {connections[name]}" for name in SERVICES)
    yield "connections", f"{open_now}; at most {connections['limit']} each", ""
    users, missing, limit = (stats["cache"][name] for name in ("users", "missing", "limit"))
    yield "cached", f"users {users}, names without a user {missing}; at most {limit}", ""
    if saved := stats["saved"]:
        works = "works" if saved["works"] else f"cannot be used, its log ({log}) says why"
        waiting = f", {saved['waiting']} changes are not on the disk yet" if saved["waiting"] else ""
        yield "saved", f"{saved['path']}, {works}{waiting}", "" if saved["works"] else common.RED
    yield "lookups", ", ".join(f"{text} {stats['lookups'][name]}" for name, text in LOOKUPS.items()), ""
    total, recalled = sum(answer["count"] for answer in stats["answers"]), stats["recalled_answers"]
    yield "answers", f"{total}, of which {recalled['given']} were recalled; {recalled['kept']} can be recalled now", ""
    for service in SERVICES:
        yield f"{service} time", describe_times(stats["seconds"][service]), ""


def replication_fields(replication: Optional[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """The same for what read_replication() says; nothing where there is one host alone."""
    if replication and replication["role"] != "single":
        text, late = common.describe_replication(replication), replication["late"]
        remedy = f"; {common.LATE_REMEDIES[replication['role']]}" if late else ""
        yield "several hosts", text + remedy, common.RED if late else ""


SERVICES = ("policy", "socketmap")
LOOKUPS = {"cache": "in the cache", "keycloak": "at Keycloak", "outage": "in the cache in an outage", "failed": "without an answer"}


def describe_keycloak(keycloak: Optional[dict[str, Any]]) -> tuple[str, str]:
    """How Keycloak is, and the colour for it; keycloak is that block of the statistics."""
    if keycloak is None:
        return "not asked: static_users of the configuration take its place", ""
    requests = keycloak["requests"]
    asked = f"{requests} requests, {keycloak['failed']} failed"
    asked += f", {common.shown_seconds(keycloak['seconds'] / requests)} each" if requests else ""
    since = keycloak["since_seconds"]
    lasting = f" for {common.shown_seconds(since)}" if since is not None else ""
    if keycloak["state"] == "answers":
        return f"answers{lasting}; {asked}", ""
    return f"away{lasting}: {keycloak['failure'] or 'no answer'}; {asked}", common.RED


def describe_times(histogram: dict[str, Any]) -> str:
    """Mean and tail of a histogram, whose counts are not cumulative."""
    total = sum(histogram["counts"])
    if not total:
        return "-"
    text = f"{common.shown_seconds(histogram['sum'] / total)} on average"
    for bound, so_far in zip(histogram["bounds"], itertools.accumulate(histogram["counts"])):
        if so_far >= 0.99 * total:
            return f"{text}, 99 of 100 within {common.shown_seconds(bound)}"
    return f"{text}, more than 1 of 100 longer than {common.shown_seconds(histogram['bounds'][-1])}"


def write_metrics(context: common.Context, path: str) -> None:
    """Write the metrics, "-" is standard output. That the daemon is down is one of them: their reader sees no exit code."""
    others = list(replication_metrics(context.replication()))
    try:
        text = context.daemon.ask_json("stats", "*", lambda stats: format_metrics([*daemon_metrics(stats), *others]))
    except common.Refused as exc:
        common.say(f"mailcloakctl: {exc}")
        text = format_metrics(others, is_up=isinstance(exc, OtherVersion))
    if path == "-":
        print(text, end="")
    else:
        replace_file(path, text)


def replace_file(path: str, text: str) -> None:
    """Put the text in place of the file: who reads it sees all of the old or all of the new. Raises Refused."""
    import tempfile

    new = ""
    try:
        if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
            raise OSError(errno.EINVAL, "not a regular file")  # such as /dev/stdout, which root would replace for everybody
        descriptor, new = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".mailcloak-")
        with open(descriptor, "w", encoding="ascii") as file:
            os.fchmod(descriptor, 0o644)
            file.write(text)
        os.rename(new, path)
    except OSError as exc:
        raise common.Refused(f"status: {path!r} cannot be written: {exc.strerror}; what was there stays") from exc
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has been renamed
            os.unlink(new)


def format_metrics(metrics: Iterable[tuple[str, str, Any]] = (), *, is_up: bool = True) -> str:
    """The metrics (name, help, value or values by labels) in the text format of Prometheus, version 0.0.4; None is left out."""
    lines: list[str] = []
    for name, help_text, value in (("up", "Whether the daemon answers.", is_up), *metrics):
        kind = "histogram" if name == "answer_seconds" else "counter" if name.endswith("_total") else "gauge"
        values = value if isinstance(value, dict) else {"": value}
        samples = [f"mailcloak_{name}{behind} {float(each)!r}" for behind, each in values.items() if each is not None]
        if samples:
            lines += [f"# HELP mailcloak_{name} {help_text}", f"# TYPE mailcloak_{name} {kind}", *samples]
    return "\n".join(lines) + "\n"


def daemon_metrics(stats: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """No label holds an address, the name of a user or any other text from outside: their values are words of the daemon."""
    answers = {labels(**{name: each[name] for name in ("service", "answer", "reason")}): each["count"] for each in stats["answers"]}
    yield "info", "The version that runs.", {labels(version=stats["version"]): 1}
    yield "start_time_seconds", "When the daemon started, in seconds since 1970.", stats["started_at"]
    yield "answers_total", "Answers, and why.", answers
    yield "recalled_answers_given_total", "Answers that were recalled: given again as a whole.", stats["recalled_answers"]["given"]
    yield "recalled_answers", "Answers that can be recalled.", stats["recalled_answers"]["kept"]
    yield "answer_seconds", "How long an answer took.", dict(histogram_samples(stats["seconds"]))
    lookups = {labels(source=name): stats["lookups"][name] for name in LOOKUPS}
    yield "lookups_total", "Users looked up, by where the answer came from.", lookups
    yield "cache_users", "Cached users.", stats["cache"]["users"]
    yield "cache_missing", "Cached names that no user has.", stats["cache"]["missing"]
    yield "cache_limit", "Entries that the cache may hold.", stats["cache"]["limit"]
    yield "database_up", "Whether the database can be used.", stats["database"]["works"]
    if stats["saved"]:
        yield "saved_up", "Whether last-known.db can be used.", stats["saved"]["works"]
        yield "saved_waiting", "Changes of users that are not on the disk yet.", stats["saved"]["waiting"]
    yield "connections", "Open connections.", {labels(service=name): stats["connections"][name] for name in SERVICES}
    yield "connections_limit", "Connections that each service takes.", stats["connections"]["limit"]
    if stats["last_reload"]:
        yield "last_reload_time_seconds", "When it was last told to reload.", stats["last_reload"]["at"]
        yield "last_reload_success", "Whether that reload was done.", stats["last_reload"]["ok"]
    keycloak = stats["keycloak"]
    if keycloak:
        yield "keycloak_up", "Whether Keycloak answers.", keycloak["state"] == "answers"
        yield "keycloak_state_seconds", "For how long it has done so, or not.", keycloak["since_seconds"]
        yield "keycloak_requests_total", "Requests to Keycloak.", keycloak["requests"]
        yield "keycloak_failed_requests_total", "Requests to Keycloak that got no usable answer.", keycloak["failed"]
        yield "keycloak_request_seconds_total", "The time that requests to Keycloak took.", keycloak["seconds"]


def replication_metrics(replication: Optional[dict[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """What read_replication() says; nothing where there is one host alone."""
    if replication and replication["role"] != "single":
        info = {labels(role=replication["role"], writer=replication["writer"]): 1}
        yield "replication_info", "The role of this host among several, and the id of the writer.", info
        yield "replication_epoch", "Which writer it is: one more with each promotion.", replication["epoch"]
        yield "replication_serial", "The last change of the writer that is here.", replication["serial"]
        age = replication["age_seconds"]
        yield "replication_age_seconds", "How old is what was brought or published last.", float("inf") if age is None else age
        yield "replication_max_lag_seconds", "replication.max_lag_seconds.", replication["max_lag_seconds"]


def labels(**texts: str) -> str:
    """The labels of a sample. JSON quotes their values as Prometheus does."""
    return "{" + ",".join(f"{name}={json.dumps(text)}" for name, text in texts.items()) + "}"


def histogram_samples(seconds: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The samples of each service's histogram by suffix and labels, cumulative as Prometheus wants them."""
    for service in SERVICES:
        histogram = seconds[service]
        for bound, so_far in zip((*map(repr, histogram["bounds"]), "+Inf"), itertools.accumulate(histogram["counts"])):
            yield f"_bucket{labels(service=service, le=bound)}", so_far
        yield f"_sum{labels(service=service)}", histogram["sum"]
        yield f"_count{labels(service=service)}", sum(histogram["counts"])


def flush(context: common.Context) -> None:
    """Let the daemon forget one user or all; it asks Keycloak again when it needs them."""
    text = context.options.address
    key = "*" if text is None else common.read_address(text) if "@" in text else common.read_username(text)
    forgotten = context.daemon.flush(key)
    if context.options.json:
        common.print_json({"forgotten": forgotten})
        return
    of = "" if key == "*" else f" of {key}"
    if forgotten:
        common.say(f"flush: {common.counted(forgotten, 'cached answer')}{of} forgotten, Keycloak is asked again")
    else:
        common.say(f"flush: nothing{of} was cached")
