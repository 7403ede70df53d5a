"""The decision tables, on the pure functions and over the wire."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections import defaultdict

import decision_table as table
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import mailcloak


class PlainFacts(mailcloak.Facts):
    """Facts that are values, without a database or Keycloak."""

    def __init__(self, row):
        self.row = row
        self.users = [
            mailcloak.User(
                name.lower(),
                "" if not email or name.startswith("service-account-") else mailcloak.normalise_address(email).text,
                on,
            )
            for name, email, on in table.USERS
        ]

    def find_alias(self, address):
        self._need_database()
        for alias, users, external, receive_only in table.LISTS:
            if alias == address.text:
                return mailcloak.Alias(tuple(users), True, tuple(external), receive_only == 1)
        found = [alias for alias in table.ALIASES if alias[0] == address.text]
        return mailcloak.Alias((found[0][1].lower(),), found[0][2] == 1) if found else None

    def find_app(self, app_id, sender):
        self._need_database()
        found = [app for app in table.APPS if app[0] == app_id]
        if not found:
            return None
        _, enabled, senders, owner, expires_at = found[0]
        state = "disabled" if not enabled else "expired" if expires_at == table.PAST else "enabled"
        return mailcloak.App(state, sender.text in senders, (owner or "").lower())

    def find_holders(self, address):
        self._need_keycloak()
        return tuple(user for user in self.users if user.email == address.text)

    def has_left(self, username):
        self._need_keycloak()
        return any(user.username == username and not user.receives for user in self.users)

    def find_login(self, sasl_username):
        self._need_keycloak()
        named = tuple(user for user in self.users if user.username == sasl_username)
        email = mailcloak.normalise_address(sasl_username).text
        return mailcloak.resolve_login(
            named,
            tuple(user for user in self.users if user.email == email) if sasl_username == email and "xn--" not in email else (),
        )

    def find_user(self, username):
        self._need_keycloak()
        return mailcloak.resolve_login(tuple(user for user in self.users if user.username == username), ())

    def _need_database(self):
        if self.row.database == "broken":
            raise mailcloak.DatabaseUnavailable("broken")

    def _need_keycloak(self):
        if self.row.keycloak == "down":
            raise mailcloak.DirectoryUnavailable("down")


def make_policy(changes):
    problems = []
    policy = mailcloak.read_block(mailcloak.PolicyConfig, "policy", {**table.POLICY, **dict(changes)}, problems)
    assert not problems
    return policy


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.id)
def test_decision_is_as_the_table_says(row):
    policy, facts = make_policy(row.policy), PlainFacts(row)
    if "query" in row.ask:
        name, _, key = row.ask["query"].partition(" ")
        if name != "alias" or not key:
            return  # the map's name is the handler's business, see the wire test
        assert mailcloak.decide_alias(key, policy, facts).text == row.answer
    else:
        request = mailcloak.PolicyRequest(**{"protocol_state": "RCPT", **row.ask})
        assert mailcloak.decide_policy(request, policy, facts).text == row.answer


@given(
    st.sampled_from(["info", "alice", "bob", "both", "spaced", "stranger", "old", "erin"]), st.text(max_size=8), st.integers(0, 1)
)
@example("info", "+ x", 0).via("a space is no reason to leave the alias out")
@example("info", "+" + "y" * 300, 1)
@example("carol", "+\u00a0", 1)
def test_what_the_policy_accepts_for_its_owner_the_map_leads_to_that_owner(base, rest, has_mailbox_domain):
    """Else Postfix would take the mail and deliver it to the mailbox of the address itself, which may be another user's."""
    local_part = base + rest
    policy = make_policy({"mailbox_domain": "mbx.test"}.items() if has_mailbox_domain else ())
    facts = PlainFacts(table.Row("", {}, ""))
    if set(local_part) & set("@%!"):  # leads to another address
        return
    accepted = mailcloak.decide_recipient(f"{local_part}@d1.test", policy, facts)
    said = mailcloak.decide_alias(f"{mailcloak.quote_local_part(local_part)}@d1.test", policy, facts)
    if accepted.reason == "alias" or (accepted.reason == "primary" and has_mailbox_domain):
        assert said.text.startswith("OK ")
    elif accepted.text == mailcloak.NO_SUCH_USER or accepted.reason == "primary":
        assert said.text == "NOTFOUND "


def test_extension_is_left_out_of_an_answer_that_postfix_would_not_take():
    facts = PlainFacts(table.Row("", {}, ""))
    users = tuple(f"user{number:04}" for number in range(1000))
    facts.find_alias = lambda address: mailcloak.Alias(users, True) if address.text == "big@d1.test" else None
    facts.has_left = lambda username: False
    for extension, kept in (("+x", "+x"), ("+" + "y" * 100, "")):
        text = mailcloak.decide_alias(f"big{extension}@d1.test", make_policy(()), facts).text
        assert text == "OK " + ",".join(f"{user}{kept}@d1.test" for user in users)
        assert len(text) <= 100_000


def _groups():
    groups = defaultdict(list)
    for row in table.ROWS:
        groups[(row.policy, row.keycloak, row.database)].append(row)
    return sorted(groups.items(), key=str)


each_state = pytest.mark.parametrize(("state", "rows"), _groups(), ids=lambda value: "" if isinstance(value, list) else str(value))


def start_in_state(state, make_daemon, keycloak):
    """A running daemon on the users, aliases and apps of the table: with this policy, this state of Keycloak and of the database."""
    policy, keycloak_state, database_state = state
    for username, email, enabled in table.USERS:
        keycloak.add_user(username, email, enabled)
    daemon = make_daemon(keycloak=keycloak.config(), policy={**table.POLICY, **dict(policy)}).start()
    fill_database(daemon.database)
    if keycloak_state == "down":
        keycloak.fault = "status-503"
    if database_state == "broken":
        daemon.database.write_bytes(b"not a database" * 1000)
    return daemon


@each_state
def test_answers_over_the_wire_are_as_the_table_says(state, rows, make_daemon, keycloak):
    daemon = start_in_state(state, make_daemon, keycloak)
    policy_client, map_client = daemon.policy(), daemon.socketmap()
    answers = {row.id: map_client.ask(row.ask["query"]) if "query" in row.ask else policy_client.ask(**row.ask) for row in rows}
    assert answers == {row.id: row.answer for row in rows}


def fill_database(path):
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.executemany("INSERT INTO aliases (alias_email, username, enabled) VALUES (?, ?, ?)", table.ALIASES)
        for alias, users, external, receive_only in table.LISTS:
            (first, is_external), *others = [*((user, 0) for user in users), *((address, 1) for address in external)]
            row = (alias, first, is_external, receive_only)
            database.execute("INSERT INTO aliases (alias_email, username, external, receive_only) VALUES (?, ?, ?, ?)", row)
            database.executemany("INSERT INTO alias_targets VALUES (?, ?, ?)", [(alias, *other) for other in others])
        for app_id, enabled, senders, owner, expires_at in table.APPS:
            row = (app_id, enabled, owner, expires_at)
            database.execute(
                "INSERT INTO apps (app_id, secret_hash, enabled, owner, expires_at) VALUES (?, '{SCRAM-SHA-256}x', ?, ?, ?)", row
            )
            database.executemany("INSERT INTO app_from (app_id, from_addr) VALUES (?, ?)", [(app_id, sender) for sender in senders])


def test_table_has_no_two_rows_of_one_name():
    names = [row.id for row in table.ROWS]
    assert sorted(set(names)) == sorted(names)


def test_domain_that_is_ours_as_written_and_as_postfix_folds_it_is_certain():
    policy = make_policy([("domain", ["strasse.test", "straße.test"])])
    action = mailcloak.decide_policy(mailcloak.PolicyRequest("RCPT", recipient="stranger@straße.test"), policy, PlainFacts(UP))
    assert action.text == table.NO_SUCH_USER


# ---- what is asked, and in which order


class CountingFacts(PlainFacts):
    def __init__(self, row):
        super().__init__(row)
        self.asked = []

    def find_holders(self, address):
        self.asked.append(address.text)
        return super().find_holders(address)

    def has_left(self, username):
        self.asked.append(username)
        return super().has_left(username)

    def find_login(self, sasl_username):
        self.asked.append(sasl_username)
        return super().find_login(sasl_username)


UP = table.Row("", {}, "")


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        pytest.param({"recipient": "info@d1.test"}, [], id="alias-needs-no-keycloak"),
        pytest.param({"recipient": "one@d1.test"}, [], id="alias-of-one-user-needs-no-keycloak"),
        pytest.param({"recipient": "both@d1.test"}, ["alice"], id="alias-of-several-asks-until-one-is-left"),
        pytest.param({"recipient": "mixed@d1.test"}, [], id="alias-that-leads-elsewhere-too-needs-no-keycloak"),
        pytest.param({"recipient": "out@d1.test"}, [], id="alias-that-leads-elsewhere-needs-no-keycloak"),
        pytest.param({"recipient": "alice@d1.test"}, ["alice@d1.test"], id="primary-one-lookup"),
        pytest.param({"recipient": "alice+x@d1.test"}, ["alice+x@d1.test", "alice@d1.test"], id="tagged-two-lookups"),
        pytest.param({"recipient": "x@elsewhere.test"}, [], id="foreign-none"),
        pytest.param({"recipient": "@d1.test"}, [], id="not-plain-none"),
        pytest.param({"recipient": "", "sender": "info@d1.test"}, [], id="unauthenticated-none"),
        pytest.param(
            {"recipient": "", "sender": "scan@d1.test", "sasl_username": "printer", "sasl_method": "PLAIN"}, [], id="app-none"
        ),
        pytest.param(
            {"recipient": "", "sender": "", "sasl_username": "alice", "sasl_method": "XOAUTH2"},
            ["alice"],
            id="null-sender-login-alone",
        ),
        pytest.param(
            {"recipient": "", "sender": "info@d1.test", "sasl_username": "alice", "sasl_method": "XOAUTH2"},
            ["alice"],
            id="own-alias",
        ),
    ],
)
def test_keycloak_is_asked_only_what_the_row_needs(request_, asked):
    facts = CountingFacts(UP)
    mailcloak.decide_policy(mailcloak.PolicyRequest(protocol_state="RCPT", **request_), make_policy(()), facts)
    assert facts.asked == asked


@pytest.mark.parametrize(
    ("changes", "attributes", "level"),
    [
        pytest.param((), {"recipient": "alice@d1.test"}, logging.DEBUG, id="accept-at-debug"),
        pytest.param((), {"recipient": "stranger@d1.test"}, logging.INFO, id="reject-at-info"),
        pytest.param(
            table._with(unauthenticated_local_sender="warn"), {"sender": "alice@d1.test"}, logging.INFO, id="warn-at-info"
        ),
        pytest.param(
            table._with(unauthenticated_local_sender="dunno"), {"sender": "alice@d1.test"}, logging.DEBUG, id="dunno-at-debug"
        ),
        pytest.param(
            (), {"sasl_username": "zed@d1.test", "sasl_method": "XOAUTH2"}, logging.WARNING, id="ambiguous-login-at-warning"
        ),
        pytest.param((), {"recipient": "x@\u1e9e.test"}, logging.INFO, id="deferral-at-info"),
    ],
)
def test_level_of_the_log_line(changes, attributes, level):
    action = mailcloak.decide_policy(
        mailcloak.PolicyRequest(protocol_state="RCPT", **attributes), make_policy(changes), PlainFacts(UP)
    )
    assert action.level == level


def test_username_that_dovecot_would_cut_is_an_error_in_the_log():
    assert mailcloak.decide_alias("plus@d1.test", make_policy(()), PlainFacts(UP)).level == logging.ERROR


def test_sender_whose_domain_is_not_convertible_is_no_question_that_was_answered_before():
    """Of a sender without a login, a remembered answer knows only the reason."""
    policy = make_policy(())
    questions = [
        mailcloak.policy_question(mailcloak.PolicyRequest("RCPT", "", "alice@d1.test", sender), policy)
        for sender in ("x@elsewhere.test", "x@\u1e9e.test")
    ]
    assert questions[0] != questions[1]
