#!/usr/bin/env python3
"""Show what mailcloak does, without Keycloak, Postfix or root.

demo.py                start a daemon, ask it a dozen questions in Postfix's protocols, and show the answers
demo.py run            run that daemon in the foreground
demo.py ask ADDRESS    ask the daemon that "run" started whether ADDRESS may receive, and show the bytes
demo.py of FOLDER      as without a word, with the programs mailcloak and mailcloakctl of this folder
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {name: [sys.executable, str(ROOT / f"{name}.py")] for name in ("mailcloak", "mailcloakctl")}
RUN_DIR = Path(tempfile.gettempdir()) / f"mailcloak-demo-{os.getuid()}"

SOURCES = {
    "alias": "SQLite: an enabled alias",
    "primary": "directory: a user's primary e-mail",
    "unknown-recipient": "neither SQLite nor the directory",
    "own-primary": "directory: the sender is the user's own",
    "own-alias": "SQLite: the alias belongs to the user",
    "sender-not-owned": "directory: the address is not the user's",
    "app": "SQLite: the app's list of senders",
    "app-sender": "SQLite: not in the app's list",
    "local-sender-unauthenticated": "our own domain, and no login",
    "sender-not-local": "not our domain: mailcloak does not check it",
    "recipient-not-local": "not our domain: Postfix decides about relaying",
    "no-alias": "SQLite: no such alias",
}

OUTSIDE = "friend@elsewhere.test"
# (question, the attributes or the map key asked, expected answer)
QUESTIONS = [
    ("mail for a user, alice@demo.test", {"recipient": "alice@demo.test"}, "DUNNO"),
    ("mail for an alias, info@demo.test", {"recipient": "info@demo.test"}, "DUNNO"),
    ("mail for an address with an extension, alice+shop@demo.test", {"recipient": "alice+shop@demo.test"}, "DUNNO"),
    ("mail for an unknown user, nobody@demo.test", {"recipient": "nobody@demo.test"}, "550 5.1.1 No such user"),
    ("mail for another host, x@elsewhere.test", {"recipient": "x@elsewhere.test"}, "DUNNO"),
    ("alice sends as herself", {"sender": "alice@demo.test", "user": "alice"}, "DUNNO"),
    ("alice sends as her alias info@demo.test", {"sender": "info@demo.test", "user": "alice"}, "DUNNO"),
    (
        "alice sends as bob@demo.test",
        {"sender": "bob@demo.test", "user": "alice"},
        "553 5.7.1 Sender not owned by authenticated user",
    ),
    ("the app printer sends as scan@demo.test", {"sender": "scan@demo.test", "app": "printer"}, "DUNNO"),
    (
        "the app printer sends as bob@demo.test",
        {"sender": "bob@demo.test", "app": "printer"},
        "553 5.7.1 Sender not owned by authenticated user",
    ),
    (
        "a client without a login sends as bob@demo.test",
        {"sender": "bob@demo.test"},
        "553 5.7.1 Sending from local domains requires authentication",
    ),
    ("where does info+shop@demo.test lead?", "info+shop@demo.test", "OK alice+shop@demo.test"),
    ("where does bob@demo.test lead?", "bob@demo.test", "NOTFOUND "),
]


def write_config(directory: Path) -> Path:
    path = directory / "config.yaml"
    path.write_text((ROOT / "demo" / "config.yaml.in").read_text().replace("@DIR@", str(directory)))
    return path


def start_daemon(config: Path, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "wb") as file:
        daemon = subprocess.Popen([*PROGRAMS["mailcloak"], str(config)], stderr=file)
    deadline = time.monotonic() + 15
    while "daemon: started" not in log.read_text():
        if daemon.poll() is not None or time.monotonic() > deadline:
            daemon.kill()
            sys.exit(f"the daemon did not start:\n{log.read_text()}")
        time.sleep(0.02)
    return daemon


def run_ctl(option: str, path: Path, *arguments: str) -> None:
    print(f"  $ mailcloakctl.py {' '.join(arguments)}", flush=True)
    result = subprocess.run([*PROGRAMS["mailcloakctl"], option, str(path), *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"it failed with exit code {result.returncode}, in {path.parent}:\n{result.stderr}")
    shown = (
        result.stderr
        if "--generate" not in arguments
        else f"{len(result.stdout.strip())} characters of token, shown once\n{result.stderr}"
    )
    print("".join(f"    {line}\n" for line in shown.splitlines()), end="", flush=True)


def policy_request(asked: dict[str, str]) -> bytes:
    login = asked.get("user") or asked.get("app") or ""
    method = {"user": "XOAUTH2", "app": "PLAIN"}.get(next((kind for kind in ("user", "app") if kind in asked), ""), "")
    attributes = {
        "request": "smtpd_access_policy",
        "protocol_state": "RCPT",
        "recipient": asked.get("recipient", "friend@elsewhere.test"),
        "sender": asked.get("sender", OUTSIDE),
        "sasl_username": login,
        "sasl_method": method,
        "client_address": "192.0.2.1",
    }
    return "".join(f"{name}={value}\n" for name, value in attributes.items()).encode() + b"\n"


def exchange(path: Path, request: bytes, end: bytes) -> bytes:
    """Send one request and read until the answer's last byte, as Postfix does."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(request)
        answer = b""
        while not answer.endswith(end):
            data = connection.recv(4096)
            if not data:
                break
            answer += data
    return answer


def ask(directory: Path, asked: dict[str, str] | str) -> str:
    if isinstance(asked, str):
        key = f"alias {asked}".encode()
        return exchange(directory / "socketmap", b"%d:%s," % (len(key), key), b",").decode().partition(":")[2][:-1]
    return exchange(directory / "policy", policy_request(asked), b"\n\n").decode()[len("action=") :].rstrip("\n")


def read_source(log: Path, number: int, asked: dict[str, str] | str) -> str:
    """Where the answer to that question came from, read from the daemon's log: the reason of the recipient check or of the sender check."""
    answers: list[str] = []
    end = time.monotonic() + 10
    while len(answers) < number and time.monotonic() < end:  # a thread of its own writes the log
        answers = [
            reason for reason in re.findall(r"reason=(\S+)", log.read_text()) if reason != "explain"
        ]  # mailcloakctl asks for that
        time.sleep(0.01)
    reasons = answers[number - 1].split(",")
    reason = reasons[0] if "recipient" in asked else reasons[-1]
    return SOURCES.get(reason, reason)


def demo() -> int:
    directory = Path(tempfile.mkdtemp(prefix="mailcloak-demo-"))
    log = directory / "log"
    daemon = None
    try:
        config = write_config(directory)
        print("mailcloak answers Postfix: who may receive, who may send, where an alias leads.\n")
        print("Users alice@demo.test and bob@demo.test; one alias and one app are added:")
        daemon = start_daemon(config, log)
        run_ctl("--config", config, "aliases", "add", "info@demo.test", "alice")
        run_ctl("--config", config, "apps", "add", "printer", "--generate")
        run_ctl("--config", config, "apps", "allow", "printer", "scan@demo.test")
        rows = [("QUESTION", "ANSWER", "WHERE IT CAME FROM")]
        wrong = 0
        for number, (question, asked, expected) in enumerate(QUESTIONS, 1):
            answer = ask(directory, asked)
            wrong += answer != expected
            shown = {"DUNNO": "DUNNO (no objection)", "NOTFOUND ": "NOTFOUND (as it is)"}.get(answer, answer)
            rows.append(
                (
                    question,
                    shown + ("" if answer == expected else f"   WRONG, expected {expected}"),
                    read_source(log, number, asked),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        print()
        for row in rows:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
        print(f"\n{len(QUESTIONS) - wrong} of {len(QUESTIONS)} answers are as they should be.", end=" ")
        print('"make run" leaves this daemon running; README.md says how to put it behind Postfix.')
        return 1 if wrong else 0
    finally:
        if daemon:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


def run() -> int:
    with contextlib.suppress(FileExistsError):
        RUN_DIR.mkdir(mode=0o700)
    status = RUN_DIR.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        sys.exit(f"{RUN_DIR} is not your own folder, remove it")
    with contextlib.suppress(OSError):
        exchange(RUN_DIR / "policy", policy_request({}), b"\n\n")
        sys.exit(f"a daemon runs in {RUN_DIR} already: end it with Ctrl-C in its terminal, or ask that one")
    shutil.rmtree(RUN_DIR)  # each run begins with the same users and the one alias
    RUN_DIR.mkdir(mode=0o700)
    config = write_config(RUN_DIR)
    run_ctl("--db", RUN_DIR / "state.db", "aliases", "add", "info@demo.test", "alice")  # no daemon can be asked yet
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    print(f"""
The daemon runs until Ctrl-C, with users alice@demo.test and bob@demo.test. From another terminal, ask it by hand:
  {python} demo/demo.py ask info@demo.test
  {python} mailcloakctl.py --config {config} aliases add sales@demo.test bob
  postmap -q info+x@demo.test socketmap:unix:{RUN_DIR}/socketmap:alias      (where Postfix is installed)
""")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(ROOT / "mailcloak.py"), str(config)])
    return 1


def ask_by_hand(address: str) -> int:
    request = policy_request({"recipient": address})
    try:
        answer = exchange(RUN_DIR / "policy", request, b"\n\n")
    except OSError as exc:
        sys.exit(f"no daemon to ask ({exc.strerror}): start it with make run")
    print(request.decode().rstrip("\n"), "\n\n", answer.decode().rstrip("\n"), sep="")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == []:
        sys.exit(demo())
    if sys.argv[1:] == ["run"]:
        sys.exit(run())
    if len(sys.argv) == 3 and sys.argv[1] == "of":
        PROGRAMS = {name: [os.path.join(sys.argv[2], name)] for name in PROGRAMS}
        sys.exit(demo())
    if len(sys.argv) == 3 and sys.argv[1] == "ask":
        sys.exit(ask_by_hand(sys.argv[2]))
    sys.exit((__doc__ or "").strip())
