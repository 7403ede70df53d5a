"""Hostile text in every attribute and query: it never leaves its place in the log, in a search at Keycloak, in SQL or in an answer."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import socket
import sqlite3
import urllib.parse

import keycloak_stand_in
import pytest

import mailcloak

NO_SUCH_USER = "550 5.1.1 No such user"
NOT_OWNED = "553 5.7.1 Sender not owned by authenticated user"
UNAUTHENTICATED = "553 5.7.1 Sending from local domains requires authentication"
INTERNAL = "451 4.3.0 Temporary internal error"

CONTROL = {
    "cr": "x\ry",
    "crlf-in-ascii-art": "x\r\x0b\x0cy",
    "nul": "x\x00y",
    "nul-at-end": "alice\x00",
    "tab": "x\ty",
    "escape-sequence": "\x1b[2J\x1b]0;title\x07",
    "delete": "x\x7fy",
    "c1-escape": "\x9b31m",
    "nel": "x\x85y",
    "line-separator": "x\u2028y\u2029z",
    "right-to-left": "\u202egro.elpmaxe\u202c",
    "zero-width": "ali\u200bce\ufeff",
    "not-a-character": "\ufffe\U0010ffff",
}
BYTES = {  # as surrogateescape shows them
    "bytes-of-no-utf8": "\udcff\udcfe\udc80",
    "overlong-slash": "\udcc0\udcaf",
    "surrogate": "\udced\udca0\udc80",
    "cut-utf8": "x\udcc3",
}
PUNCTUATION = {
    "quotes": "'\"`",
    "quoted": '"a b"',
    "angle-brackets": "x> reason=ok elapsed_ms=0",
    "brackets": "[x](y){z}",
    "comma-and-semicolon": "x,y;z:w",
    "backslashes": "\\x0a\\n\\",
    "equals": "x=y=z",
    "spaces": " x  y ",
    "forged-line": "x 2024-01-01 00:00:00,000 info daemon: stopped",
    "percent-format": "%s%n%(asctime)s{0}",
    "lookup": "${jndi:ldap://x/}",
}
SEARCH = {
    "star": "*",
    "star-after": "a*",
    "percent": "%",
    "percent-after": "a%",
    "underscore": "_lice",
    "question-mark": "alic?",
    "more-parameters": "alice&exact=false&max=1000",
    "fragment": "alice#x",
    "encoded": "alice%40d1.test%00%26max=0",
    "plus": "alice+x+y",
    "path": "../../realms/master",
    "ldap": "*)(uid=*",
    "sql-or": "' OR 1=1 --",
    "sql-or-tight": "'OR/**/1=1--",
    "sql-drop": "'; DROP TABLE aliases; --",
    "sql-union": "x'UNION/**/SELECT'alice',1--",
}
PROTOCOL = {
    "netstring": "5:alias,",
    "netstring-digits": "10000:",
    "answer": "action=OK",
    "empty-netstrings": "0:,0:,",
}
LONG = {"300-letters": "a" * 300, "301-spaces": " " * 301, "3000-letters": "ü" * 1500, "3000-controls": "\x01" * 3000}
NASTY = {**CONTROL, **BYTES, **PUNCTUATION, **SEARCH, **PROTOCOL, **LONG, "empty": "", "plain": "plain"}

FORMS = {  # how the text stands in an address
    "alone": "{}",
    "local-part": "{}@d1.test",
    "extension": "info+{}@d1.test",
    "domain": "alice@{}",
    "before-domain": "alice@d1.test{}",
    "routed": "{}%d1.test@elsewhere.test",
}


def not_convertible(texts):
    """Which of them, in a domain, make it one that could be ours: not ASCII and no domain, or with what Postfix may drop."""
    dropped = {*map(chr, range(33)), *'"(),;<>\\\x7f'}
    return {
        f"{name}-{form}"
        for name, text in texts.items()
        for form in ("domain", "before-domain")
        if (not text.isascii() and name != "zero-width") or not dropped.isdisjoint(text)  # zero-width is ignored
    }


NOT_CONVERTIBLE = not_convertible({name: text.partition("\n")[0] for name, text in NASTY.items()})  # the attribute ends there
ADDRESSES = {f"{name}-{form}": pattern.format(text) for name, text in NASTY.items() for form, pattern in FORMS.items()}

VALUE = r'([^ <>"]*)'
LOG_LINE = re.compile(r"\S+ \S+ (debug|info|warning|error) (daemon|server|database|directory|policy|socketmap|config): \S.*")
POLICY_LINE = re.compile(
    rf"\S+ \S+ (?:debug|info) policy: (?:accept|reject|defer) state={VALUE} recipient=<{VALUE}> sender=<{VALUE}> client={VALUE}"
    rf"(?: queue_id={VALUE})?(?: sasl_username={VALUE})? reason=[a-z,-]+ elapsed_ms=[0-9]+"
)
SOCKETMAP_LINE = re.compile(
    rf"\S+ \S+ (?:debug|info|error) socketmap: (?:found|not-found|defer|error) map={VALUE} key=<{VALUE}>(?: mailbox=<{VALUE}>)?"
    r" reason=[a-z-]+ elapsed_ms=[0-9]+"
)
BAD_REQUEST_LINE = re.compile(r'\S+ \S+ warning (?:policy|socketmap): bad request, connection closed reason="[^"]*"')
LOGGED = ("protocol_state", "recipient", "sender", "client_address", "queue_id", "sasl_username")


def unescaped(text):
    """What a value of the log says."""
    return (text or "").encode("ascii", "backslashreplace").decode("unicode_escape")


def shortened(text):
    return text if len(text) <= 300 else text[:300] + "..."


def log_lines(daemon):
    """The lines of the log after its start, each checked to be one event and nothing but printable characters."""
    daemon.await_log()
    text = daemon.log_path.read_bytes().decode()  # as it is: read_text() would take \r and what is not UTF-8 for something else
    lines = text.split("\n")
    assert lines.pop() == ""
    for line in lines:
        assert line.isprintable(), repr(line)
        assert LOG_LINE.fullmatch(line), line
        assert "internal error" not in line
    return lines[next(number for number, line in enumerate(lines, 1) if "daemon: started" in line) :]


def decisions(daemon, pattern):
    """The values of each line that tells of a decision, unescaped; each other line must tell of a bad request or of Keycloak."""
    found = []
    for line in log_lines(daemon):
        match = pattern.fullmatch(line)
        if match:
            found.append(tuple(map(unescaped, match.groups())))
        else:
            assert BAD_REQUEST_LINE.fullmatch(line) or ": connection lost" in line or "RFC 5321" in line, line
    return found


def exchange(client, data):
    """The one answer to these bytes, None where the connection is closed."""
    client.send_bytes(data)
    answer = client.receive()
    assert client.buffer == b""
    assert answer is None or not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", answer)
    return answer


def policy_bytes(attributes):
    return "".join(f"{name}={value}\n" for name, value in attributes.items()).encode("utf-8", "surrogateescape") + b"\n"


GOOD = {"request": "smtpd_access_policy", "protocol_state": "RCPT", "recipient": "alice@d1.test", "sender": "x@elsewhere.test"}


@pytest.fixture
def raw_searches(monkeypatch):
    """The request lines of all that is asked of the stand-in, as they came over the wire."""
    paths = []
    do_get = keycloak_stand_in._Handler.do_GET

    def note(handler):
        paths.append(handler.path)
        do_get(handler)

    monkeypatch.setattr(keycloak_stand_in._Handler, "do_GET", note)
    return paths


def searched(raw_searches):
    """The attributes and values searched for; each search checked to have its four parameters once and nothing beside them."""
    found = []
    for path in raw_searches:
        assert re.fullmatch(r"[A-Za-z0-9%._~&=?/+-]+", path), path
        path, _, query = path.partition("?")
        if query == urllib.parse.urlencode(keycloak_stand_in.SELF_CHECK) or path.endswith("/users/profile"):
            continue
        assert path == "/admin/realms/mail/users"
        (attribute, value), *others = urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict")
        assert others == [("exact", "true"), ("briefRepresentation", "true"), ("max", "10")], path
        found.append((attribute, value))
    return found


# ---- policy


@pytest.mark.parametrize(
    "attribute",
    [
        "protocol_state",
        "policy_context",
        "client_address",
        "queue_id",
        "sasl_method",
        "instance",
        "helo_name",
        "client_name",
        "size",
    ],
)
def test_nasty_attribute_is_answered_and_stays_in_its_place(keycloak_daemon, raw_searches, attribute):
    client, sent = keycloak_daemon.policy(), []
    for name, text in NASTY.items():
        nasty, good = {**GOOD, attribute: text}, {**GOOD, "recipient": "stranger@d1.test"}
        assert exchange(client, policy_bytes(nasty)) == "DUNNO", name
        assert exchange(client, policy_bytes(good)) == NO_SUCH_USER, f"after {name}"
        sent += [nasty, good]
    expected = [tuple(shortened(attributes.get(name, "")) for name in LOGGED) for attributes in sent]
    assert decisions(keycloak_daemon, POLICY_LINE) == expected
    assert ("email", "stranger@d1.test") in searched(raw_searches)
    assert set(searched(raw_searches)) <= {("email", "alice@d1.test"), ("email", "stranger@d1.test")}


@pytest.mark.parametrize(
    ("attribute", "others", "forms", "accepted", "wild"),
    [
        pytest.param("recipient", {}, ("local-part",), {"plus-local-part"}, "*@d1.test", id="recipient"),
        pytest.param(
            "sender",
            {"sasl_username": "alice"},
            ("alone", "local-part", "domain", "before-domain", "routed"),
            {"empty-alone", "empty-before-domain", "plus-local-part"},
            "a%@d1.test",
            id="sender",
        ),
        pytest.param(
            "sasl_username",
            {"sender": "alice@d1.test"},
            tuple(FORMS),
            {"empty-before-domain"},
            "alice&exact=false&max=1000",
            id="sasl_username",
        ),
    ],
)
def test_nasty_address_is_nobody_elses_and_stays_in_its_place(
    keycloak_daemon, raw_searches, attribute, others, forms, accepted, wild
):
    """accepted are the few that do name alice; wild is one that must reach Keycloak, so that the test sees something."""
    keycloak_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    client, sent, answers = keycloak_daemon.policy(), [], {}
    for name, text in ADDRESSES.items():
        attributes = {**GOOD, **others, attribute: text}
        answers[name] = exchange(client, policy_bytes(attributes))
        assert answers[name] in ("DUNNO", NO_SUCH_USER, NOT_OWNED, UNAUTHENTICATED, INTERNAL), name
        sent.append(attributes)
    assert {name for name in answers if answers[name] == INTERNAL} == (set() if attribute == "sasl_username" else NOT_CONVERTIBLE)
    assert {name for name in answers if answers[name] == "DUNNO" and name in names_of(forms)} == accepted
    expected = [tuple(shortened(attributes.get(name, "")) for name in LOGGED) for attributes in sent]
    assert decisions(keycloak_daemon, POLICY_LINE) == expected
    asked = searched(raw_searches)
    emails = {mailcloak.normalise_address(text).text for text in ADDRESSES.values()} | {"alice@d1.test", "info@d1.test"}
    assert {value for kind, value in asked if kind == "email"} <= emails
    assert {value for kind, value in asked if kind == "username"} <= {text.lower() for text in ADDRESSES.values()} | {"alice"}
    assert wild in {value for _, value in asked}


def names_of(forms):
    return {f"{name}-{form}" for name in NASTY for form in forms}


def test_nasty_attribute_names_are_ignored(static_daemon):
    client = static_daemon.policy()
    for name, text in NASTY.items():
        attributes = {**GOOD, text.replace("=", ""): "x", "recipient": "stranger@d1.test"}
        assert exchange(client, policy_bytes(attributes)) == NO_SUCH_USER, name
    assert len(decisions(static_daemon, POLICY_LINE)) == len(NASTY)


def test_nasty_kind_of_request_closes_the_connection_and_stays_in_its_place(static_daemon):
    for text in NASTY.values():
        assert exchange(static_daemon.policy(), policy_bytes({**GOOD, "request": text})) is None
    reasons = [line.partition("reason=")[2] for line in log_lines(static_daemon) if "bad request" in line]
    expected = [f"request={shortened(text)}, expected smtpd_access_policy" for text in NASTY.values()]
    assert [unescaped(reason.strip('"')) for reason in reasons] == expected


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        pytest.param("x\ny", {"x": NO_SUCH_USER}, id="line"),
        pytest.param("x\r\ny", {"x\r": NO_SUCH_USER}, id="line-after-cr"),
        pytest.param("x\n2024-01-01 00:00:00,000 info daemon: stopped", {"x": NO_SUCH_USER}, id="forged-line"),
        pytest.param("x\n2024-01-01 00:00:00,000 info daemon: stopped=1", {"x": NO_SUCH_USER}, id="forged-line-as-attribute"),
        pytest.param("x\naction=OK", {"x": NO_SUCH_USER}, id="answer-as-attribute"),
        pytest.param("x\n\naction=OK", {"x": NO_SUCH_USER}, id="answer-after-the-end"),
        pytest.param("x\n\n", {"x": NO_SUCH_USER}, id="end-of-request"),
        pytest.param("x\nrecipient=alice@d1.test", {"alice@d1.test": "DUNNO"}, id="another-recipient"),
        pytest.param(
            "x\n\nrequest=smtpd_access_policy\nprotocol_state=RCPT\nrecipient=y",
            {"x": NO_SUCH_USER, "y": NO_SUCH_USER},
            id="another-request",
        ),
    ],
)
def test_newline_in_a_value_begins_an_attribute_and_never_a_line_of_answer_or_log(static_daemon, value, answers):
    """answers: what is said of which recipient; then the connection is closed or waits for more."""
    client = static_daemon.policy()
    client.send_bytes(policy_bytes({"request": "smtpd_access_policy", "protocol_state": "RCPT", "recipient": value}))
    client.socket.shutdown(socket.SHUT_WR)
    assert [client.receive() for _ in range(len(answers) + 1)] == [*answers.values(), None]
    assert static_daemon.ask(recipient="bob@d1.test") == "DUNNO"
    assert [values[1] for values in decisions(static_daemon, POLICY_LINE)] == [*answers, "bob@d1.test"]


# ---- searches that widen


WILD_NAMES = ("a*", "*", "a%", "%", "_lice", "?lice", "[a]lice", "a.*", "alice|bob")


@pytest.mark.parametrize("server", ["exact", "wildcards"])
def test_user_whose_name_is_a_wildcard_is_that_user_alone(keycloak_daemon, keycloak, server):
    """Even if the server reads the name as a pattern and sends every user that matches it."""
    for wild in WILD_NAMES:
        keycloak.add_user(wild, f"{wild}@d1.test")
    if server == "wildcards":
        keycloak.search = lambda query: [user for user in keycloak.users if fits(user, query)]
    token = {"protocol_state": "MAIL", "sasl_method": "XOAUTH2"}
    for wild in WILD_NAMES:
        answers = {
            "mail to the user": keycloak_daemon.ask(recipient=f"{wild}@d1.test"),
            "the user as the own name": keycloak_daemon.ask(sender=f"{wild}@d1.test", sasl_username=wild, **token),
            "the user as alice": keycloak_daemon.ask(sender="alice@d1.test", sasl_username=wild, **token),
            "alice as the user": keycloak_daemon.ask(sender=f"{wild}@d1.test", sasl_username="alice", **token),
            "alice as herself": keycloak_daemon.ask(sender="alice@d1.test", sasl_username="alice", **token),
        }
        assert answers == {
            "mail to the user": "DUNNO",
            "the user as the own name": "DUNNO",
            "the user as alice": NOT_OWNED,
            "alice as the user": NOT_OWNED,
            "alice as herself": "DUNNO",
        }, wild


def fits(user, query):
    """Does the user fit a search of a server that ignores exact and knows each sort of wildcard?"""
    for attribute in ("username", "email"):
        if attribute in query:
            pattern = query[attribute].replace("%", "*").replace("_", "?")
            value = user.get(attribute, "")
            return fnmatch.fnmatchcase(value, pattern) or pattern == value
    return True


def test_wildcard_that_is_nobodys_name_finds_nobody(keycloak_daemon, keycloak):
    keycloak.search = lambda query: [user for user in keycloak.users if fits(user, query)]
    nobodys = [text for name, text in SEARCH.items() if name != "plus"]  # alice+x+y is alice
    recipients = {text: keycloak_daemon.ask(recipient=f"{text}@d1.test") for text in nobodys}
    assert recipients == dict.fromkeys(nobodys, NO_SUCH_USER)
    senders = {text: keycloak_daemon.ask(protocol_state="MAIL", sender="alice@d1.test", sasl_username=text) for text in nobodys}
    assert senders == dict.fromkeys(nobodys, NOT_OWNED)


# ---- SQL


@pytest.fixture
def filled_daemon(make_daemon):
    """A running daemon with the aliases info and %, and the apps printer and %."""
    daemon = make_daemon(static_users={"alice": "alice@d1.test", "bob": "bob@d1.test"}).start()
    with contextlib.closing(sqlite3.connect(daemon.database)) as database, database:
        aliases = [("info@d1.test", "alice"), ("%@d1.test", "bob")]
        database.executemany("INSERT INTO aliases (alias_email, username) VALUES (?, ?)", aliases)
        database.executemany("INSERT INTO apps (app_id, secret_hash) VALUES (?, 'x')", [("printer",), ("%",)])
        database.executemany("INSERT INTO app_from VALUES (?, ?, 1)", [("printer", "scan@d1.test"), ("%", "percent@d1.test")])
    return daemon


def tables(daemon):
    with contextlib.closing(sqlite3.connect(daemon.database)) as database:
        return list(database.iterdump())


SQL_NAMES = (
    "%", "_", "_nfo", "i%", "inf_", "*", "i*", "' OR 1=1 --", "'OR/**/1=1--", "info'--", 'info"--', "info';--", "info\\", "info`",
    "x'UNION/**/SELECT'alice',1--", "';DROP/**/TABLE/**/aliases;--", "info\x00", "\x00info", "info\udcff", "info\u200b", "?", "?1", ":1", "@1",
    "[info]", "i/**/nfo", "printer'--", "printe_", "p%", "printer\x00", "x'OR'1'='1",
)  # fmt: skip


def test_names_that_sql_would_read_otherwise_are_names(filled_daemon):
    """Each is nobody's, but for % itself, which is bob's alias and an app."""
    before, mail = tables(filled_daemon), {"protocol_state": "MAIL"}
    for name in SQL_NAMES:
        answers = {
            "alias": filled_daemon.ask_map(f"alias {name}@d1.test"),
            "recipient": filled_daemon.ask(recipient=f"{name}@d1.test"),
            "as printer": filled_daemon.ask(sender="scan@d1.test", sasl_username=name, sasl_method="PLAIN", **mail),
            "as %": filled_daemon.ask(sender="percent@d1.test", sasl_username=name, sasl_method="PLAIN", **mail),
            "printer as it": filled_daemon.ask(sender=f"{name}@d1.test", sasl_username="printer", **mail),
            "info": filled_daemon.ask_map("alias info@d1.test"),
        }
        is_percent = name == "%"
        assert answers == {
            "alias": "OK bob@d1.test" if is_percent else "NOTFOUND ",
            "recipient": "DUNNO" if is_percent else NO_SUCH_USER,
            "as printer": NOT_OWNED,
            "as %": "DUNNO" if is_percent else NOT_OWNED,
            "printer as it": NOT_OWNED,
            "info": "OK alice@d1.test",
        }, ascii(name)
    assert tables(filled_daemon) == before
    assert "error database" not in filled_daemon.log()


# ---- socketmap

MAP_TEXTS = {
    **NASTY,
    "newline": "x\ny",
    "forged-lines": "x\n2024-01-01 00:00:00,000 info daemon: stopped\n",
    "two-newlines": "\n\n",
}


def socketmap_bytes(text):
    data = text.encode("utf-8", "surrogateescape")
    return b"%d:%s," % (len(data), data)


def test_nasty_map_name_is_refused_and_stays_in_its_place(static_daemon):
    client = static_daemon.socketmap()
    names = {name: text.replace(" ", "_") for name, text in MAP_TEXTS.items()}  # the name ends at a space
    for name, text in names.items():
        answer = exchange(client, socketmap_bytes(f"{text} info@d1.test"))
        assert re.fullmatch(r'PERM unknown map [^ <>"]{0,64}', answer), name
        assert len(answer) == len("PERM unknown map ") + 64 or unescaped(answer[len("PERM unknown map ") :]) == text
        assert exchange(client, socketmap_bytes("alias x@d1.test")) == "NOTFOUND "
    logged = decisions(static_daemon, SOCKETMAP_LINE)
    assert logged[::2] == [(shortened(text), "info@d1.test", "") for text in names.values()]


def test_nasty_key_is_nobodys_and_stays_in_its_place(keycloak_daemon, raw_searches):
    keycloak_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    client, keys, answers = keycloak_daemon.socketmap(), [], {}
    for name, text in MAP_TEXTS.items():
        for form, pattern in FORMS.items():
            keys.append(pattern.format(text) or "x")
            answers[name, form] = exchange(client, socketmap_bytes(f"alias {keys[-1]}"))
            assert exchange(client, socketmap_bytes("alias info@d1.test")) == "OK alice@d1.test"
    found = {names: answer for names, answer in answers.items() if answer.startswith("OK ")}
    deferred = {f"{name}-{form}" for (name, form), answer in answers.items() if answer == "TEMP domain not convertible"}
    assert not_convertible(MAP_TEXTS) >= deferred >= {"right-to-left-domain", "bytes-of-no-utf8-before-domain"}
    assert len(found) + len(deferred) + list(answers.values()).count("NOTFOUND ") == len(answers)
    assert {form for _, form in found} == {"extension"}
    for (name, _), answer in found.items():
        text = MAP_TEXTS[name].lower()
        assert answer == (f"OK alice+{text}@d1.test" if mailcloak.is_plain_text(text) else "OK alice@d1.test")
        assert not set(text) & set(' ,:;"()<>[]\\@'), f"{answer} would be more than one address"
    assert len(found) > 5
    logged = decisions(keycloak_daemon, SOCKETMAP_LINE)
    expected = [(answer[3:] if answer.startswith("OK ") else "", shortened(key)) for key, answer in zip(keys, answers.values())]
    assert [(mailbox, key) for _, key, mailbox in logged[::2]] == expected
    emails = {mailcloak.normalise_address(key).text for key in keys}  # whether a spelling with an extension is somebody's own
    assert {kind for kind, _ in searched(raw_searches)} == {"email"}
    assert {value for _, value in searched(raw_searches)} <= emails
