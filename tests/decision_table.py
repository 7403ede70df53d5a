"""The decision tables as data: one set of users, aliases and apps, and rows of question and answer.

Each row is tried on the pure functions and over the wire, see test_policy_decisions.py.
"""

from __future__ import annotations

from typing import NamedTuple

NO_SUCH_USER = "550 5.1.1 No such user"
NOT_OWNED = "553 5.7.1 Sender not owned by authenticated user"
UNAUTHENTICATED = "553 5.7.1 Sending from local domains requires authentication"
DIRECTORY = "451 4.3.0 Temporary authentication/lookup failure"
INTERNAL = "451 4.3.0 Temporary internal error"
DUNNO = "DUNNO"
DELIMITER = "TEMP username {} holds a recipient delimiter"

# username, primary e-mail, enabled
USERS = [
    ("alice", "alice@d1.test", True),
    ("Bob", "Bob@D1.test", True),
    ("carol", "carol@d2.test", True),
    ("dora", "dora@d1.test", False),
    ("noemail", None, True),
    ("service-account-shop", "service@d1.test", True),
    ("frank", "frank@elsewhere.test", True),
    ("tina", "info+tina@d1.test", True),  # a primary e-mail that looks like a tagged alias
    ("twin1", "twin@d1.test", True),
    ("twin2", "twin@d1.test", True),
    ("half1", "half@d1.test", True),
    ("half2", "half@d1.test", False),
    ("erin@d1.test", "erin@d1.test", True),  # a realm with e-mail as username
    ("zed@d1.test", "other@d1.test", True),  # whose username is another user's e-mail
    ("zoe", "zed@d1.test", True),
    ("noemail@d1.test", None, True),
    ("nora", "noemail@d1.test", True),
    ("sam", "shadow@d1.test", True),
    ("dis", "dis@d1.test", True),
    ("printer", "printer@d1.test", True),  # has the name of an app
    ("oldapp", "oldapp@d1.test", True),
    ("hans", "hans@xn--bcher-kva.test", True),
    ("ulla", "ulla@bücher.test", True),
    ("jürgen", "jürgen@d1.test", True),
    ("mina", "می\u200cخواهم@d1.test", True),  # with a non-joiner, as Persian is written
    ("newton", "x\U000e0fff@d1.test", True),  # of a character that no table of Unicode has yet
    ("lou+2", "lou@d1.test", True),  # a username that Dovecot would cut
]

# alias, username, enabled
ALIASES = [
    ("info@d1.test", "alice", 1),
    ("sales@d2.test", "Bob", 1),
    ("old@d1.test", "alice", 0),
    ("shadow@d1.test", "alice", 1),  # also the primary e-mail of sam
    ("dis@d1.test", "alice", 0),  # also the primary e-mail of dis
    ("off+tag@d1.test", "alice", 0),
    ("off@d1.test", "alice", 1),
    ("x@foreign.test", "alice", 1),
    ("owner-list@d1.test", "alice", 1),
    ("owner@d1.test", "bob", 1),
    ("list-request@d1.test", "alice", 1),
    ("postmaster@d1.test", "alice", 1),
    ("mail@d1.test", "erin@d1.test", 1),
    ("spaced@d1.test", "two words", 1),
    ("büro@d1.test", "alice", 1),
    ("info@xn--bcher-kva.test", "hans", 1),
    ("dash@d1.test", "anne-marie", 1),
    ("plus@d1.test", "alice+x", 1),
    ("leading@d1.test", "+alice", 1),
    ("plus-address@d1.test", "erin+x@d2.test", 1),
    ("dash-domain@d1.test", "erin@d-2.test", 1),
]

# app, enabled, senders, owner, expires_at
PAST, FUTURE = 1_700_000_000, 4_000_000_000
APPS = [
    ("printer", 1, ["scan@d1.test"], None, None),
    ("shop", 1, ["shop@d1.test", "", "news@elsewhere.test"], None, FUTURE),
    ("oldapp", 0, ["old@d1.test"], None, None),
    ("trial", 1, ["scan@d1.test"], None, PAST),
    ("owned", 1, ["scan@d1.test"], "Alice", FUTURE),
    ("orphan", 1, ["scan@d1.test"], "gone", None),
    ("left", 1, ["scan@d1.test"], "dora", None),
]

POLICY = {"domain": ["d1.test", "d2.test", "bücher.test"], "recipient_delimiter": "+"}


class Row(NamedTuple):
    id: str
    ask: dict  # attributes of a policy request, or {"query": ...} for the socketmap
    answer: str
    policy: tuple = ()  # changes to POLICY, as items
    keycloak: str = "up"  # or "down"
    database: str = "up"  # or "broken"


def _recipient(id, recipient, answer, **state):
    return Row(
        f"rcpt-{id}", {"protocol_state": "RCPT", "recipient": recipient, "sender": "someone@elsewhere.test"}, answer, **state
    )


def _sender(id, sender, answer, user="", method="", **state):
    attributes = {"protocol_state": "MAIL", "sender": sender, "sasl_username": user, "sasl_method": method}
    return Row(f"sender-{id}", attributes, answer, **state)


def _token(id, user, sender, answer, method="XOAUTH2", **state):
    return _sender(f"user-{id}", sender, answer, user, method, **state)


def _app(id, user, sender, answer, method="PLAIN", **state):
    return _sender(f"app-{id}", sender, answer, user, method, **state)


def _map(id, query, answer, **state):
    return Row(f"map-{id}", {"query": query}, answer, **state)


def _with(**changes):
    return tuple(sorted(changes.items()))


MAILBOXES = _with(mailbox_domain="mailbox.internal")
STREETS = _with(domain="strasse.test")
DASHES = _with(recipient_delimiter="+-")
RECIPIENTS_PASS = _with(keycloak_failure_mode="dunno-recipients")
ALL_PASS = _with(keycloak_failure_mode="dunno")

ROWS = [
    # ---- section 4, recipients
    _recipient("empty", "", DUNNO),
    _recipient("foreign-domain", "x@elsewhere.test", DUNNO),
    _recipient("subdomain-is-foreign", "alice@sub.d1.test", DUNNO),
    _recipient("primary", "alice@d1.test", DUNNO),
    _recipient("primary-any-case", "ALICE@D1.Test", DUNNO),
    _recipient("primary-stored-in-mixed-case", "bob@d1.test", DUNNO),
    _recipient("primary-second-domain", "carol@d2.test", DUNNO),
    _recipient("primary-local-part-in-other-domain", "carol@d1.test", NO_SUCH_USER),
    _recipient("username-is-no-address", "tina@d1.test", NO_SUCH_USER),
    _recipient("alias", "info@d1.test", DUNNO),
    _recipient("alias-any-case", "Info@D1.TEST", DUNNO),
    _recipient("alias-of-other-domain", "info@d2.test", NO_SUCH_USER),
    _recipient("alias-disabled", "old@d1.test", NO_SUCH_USER),
    _recipient("alias-disabled-over-primary", "dis@d1.test", DUNNO),
    _recipient("alias-in-foreign-domain", "x@foreign.test", DUNNO),
    _recipient("stranger", "stranger@d1.test", NO_SUCH_USER),
    _recipient("user-disabled", "dora@d1.test", NO_SUCH_USER),
    _recipient("user-of-foreign-address", "frank@d1.test", NO_SUCH_USER),
    _recipient("service-account", "service@d1.test", NO_SUCH_USER),
    _recipient("app-receives-nothing", "scan@d1.test", NO_SUCH_USER),
    _recipient("two-users-both-enabled", "twin@d1.test", DUNNO),
    _recipient("two-users-one-enabled", "half@d1.test", DUNNO),
    _recipient("tagged-primary", "alice+news@d1.test", DUNNO),
    _recipient("tagged-alias", "info+news@d1.test", DUNNO),
    _recipient("tagged-stranger", "stranger+x@d1.test", NO_SUCH_USER),
    _recipient("tagged-disabled-exact", "off+tag@d1.test", NO_SUCH_USER),
    _recipient("tagged-beside-disabled-exact", "off+other@d1.test", DUNNO),
    _recipient("empty-extension", "alice+@d1.test", DUNNO),
    _recipient("delimiter-first", "+alice@d1.test", NO_SUCH_USER),
    _recipient("two-delimiters", "alice+a+b@d1.test", DUNNO),
    _recipient("no-delimiter-configured", "alice+news@d1.test", NO_SUCH_USER, policy=_with(recipient_delimiter="")),
    _recipient("other-delimiter", "alice-news@d1.test", DUNNO, policy=DASHES),
    _recipient("owner-is-not-split", "owner-alice@d1.test", NO_SUCH_USER, policy=DASHES),
    _recipient("owner-list", "owner-list@d1.test", DUNNO, policy=DASHES),
    _recipient("request-is-not-split", "alice-request@d1.test", NO_SUCH_USER, policy=DASHES),
    _recipient("owner-is-split-by-plus-alone", "owner-list+x@d1.test", DUNNO),
    _recipient("trailing-dot", "alice@d1.test.", DUNNO),
    _recipient("trailing-dot-stranger", "stranger@d1.test.", NO_SUCH_USER),
    _recipient("percent", "alice%d1.test", DUNNO),
    _recipient("percent-stranger", "stranger%d1.test", NO_SUCH_USER),
    _recipient("bang", "d1.test!alice", DUNNO),
    _recipient("bang-stranger", "d1.test!stranger", NO_SUCH_USER),
    _recipient("source-route", "@relay.test:alice@d1.test", DUNNO),
    _recipient("source-route-stranger", "@relay.test:stranger@d1.test", NO_SUCH_USER),
    _recipient("bare", "alice", NO_SUCH_USER),
    _recipient("nothing-before-at", "@d1.test", NO_SUCH_USER),
    _recipient("nothing-after-at", "alice@", NO_SUCH_USER),
    _recipient("two-at", "alice@evil@d1.test", NO_SUCH_USER),
    _recipient("two-at-foreign-last", "alice@d1.test@elsewhere.test", DUNNO),
    _recipient("routed-through-a-host", "stranger%d1.test@elsewhere.test", NO_SUCH_USER),
    _recipient("routed-through-a-host-user", "alice%d1.test@elsewhere.test", DUNNO),
    _recipient("routed-through-a-literal", "d1.test!stranger@[127.0.0.1]", NO_SUCH_USER),
    _recipient("routed-quoted", "stranger@d1.test@[127.0.0.1]", NO_SUCH_USER),
    _recipient("routed-twice", "stranger%d1.test%x.test@elsewhere.test", NO_SUCH_USER),
    _recipient("routed-elsewhere", "a!b%c@elsewhere.test", DUNNO),
    _recipient("routed-mailbox-domain", "alice%mailbox.internal@elsewhere.test", NO_SUCH_USER, policy=MAILBOXES),
    _recipient("routed-with-a-dot", "stranger%d1.test.@elsewhere.test", NO_SUCH_USER),
    _recipient("routed-with-a-dot-user", "alice%d1.test.@elsewhere.test", DUNNO),
    _recipient("routed-with-a-percent-at-the-end", "stranger%d1.test%@elsewhere.test", NO_SUCH_USER),
    _recipient("routed-with-two-percents-at-the-end", "dora%d1.test%%@[127.0.0.1]", NO_SUCH_USER),
    _recipient("routed-in-quotes", "dora+ %d1.test@[127.0.0.1]", NO_SUCH_USER),
    _recipient("routed-in-quotes-user", "alice+ %d1.test@[127.0.0.1]", DUNNO),
    _recipient("routed-in-quotes-by-a-bang", "d1.test!no body@elsewhere.test", NO_SUCH_USER),
    _recipient("routed-in-quotes-by-both", "x!y z%d1.test@elsewhere.test", NO_SUCH_USER),
    _recipient("routed-to-a-mailbox", "alice%mailbox.internal%@elsewhere.test", NO_SUCH_USER, policy=MAILBOXES),
    _recipient("space-in-the-extension", "alice+x y@d1.test", DUNNO),
    _recipient("space-in-the-extension-of-a-stranger", "stranger+x y@d1.test", NO_SUCH_USER),
    _recipient("space-before-the-extension", "al ice+x@d1.test", NO_SUCH_USER),
    _recipient("primary-that-looks-tagged", "info+tina@d1.test", DIRECTORY),
    _recipient("primary-that-looks-tagged-mailboxes", "info+tina@d1.test", DUNNO, policy=MAILBOXES),
    _recipient("folded-domain-of-ours", "alice@strasse.test", INTERNAL, policy=_with(domain="straße.test")),
    _recipient("folded-capitals-of-ours", "alice@ΒΌΛΟΣ.TEST", INTERNAL, policy=_with(domain="βόλος.test")),
    _recipient("percent-with-a-dot-is-quoted", "alice%d1.test.", NO_SUCH_USER),
    _recipient("space", "alice @d1.test", NO_SUCH_USER),
    _recipient("wildcard", "*@d1.test", NO_SUCH_USER),
    _recipient("sql-wildcard", "%@d1.test", NO_SUCH_USER),
    _recipient("sql-quote", "a' or '1'='1@d1.test", NO_SUCH_USER),
    _recipient("over-long", "a" * 300 + "@d1.test", NO_SUCH_USER),
    _recipient("not-utf8", "alice\udcff@d1.test", NO_SUCH_USER),
    _recipient("international-local-part", "jürgen@d1.test", DUNNO),
    _recipient("international-alias", "BÜRO@d1.test", DUNNO),
    _recipient("international-domain-unicode", "hans@bücher.test", DUNNO),
    _recipient("international-domain-a-label", "ulla@xn--bcher-kva.test", DUNNO),
    _recipient("international-domain-alias", "info@BÜCHER.test", DUNNO),
    _recipient("international-domain-stranger", "stranger@bücher.test", NO_SUCH_USER),
    _recipient("domain-not-convertible", "x@\u2488.test", INTERNAL),
    _recipient("domain-not-convertible-outage-all-pass", "x@\u2488.test", INTERNAL, keycloak="down", policy=ALL_PASS),
    _recipient("domain-not-convertible-inside", "x%\u1e9e.test@elsewhere.test", INTERNAL),
    _recipient("domain-not-convertible-outside", "alice%d1.test@\u1e9e.test", INTERNAL),
    _recipient("domain-not-convertible-in-a-local-part", "x%\u1e9e.test@d1.test", NO_SUCH_USER),
    _recipient("domain-of-ours-and-many-ignored-signs", "stranger@d1" + "\u00ad" * 255 + ".test", INTERNAL),
    _recipient("domain-of-ours-in-fullwidth", "stranger@ｄ１.test", NO_SUCH_USER),
    _recipient("domain-that-postfix-folds-to-ours", "stranger@straße.test", INTERNAL, policy=STREETS),
    _recipient("domain-that-postfix-folds-to-ours-user", "alice%straße.test@elsewhere.test", INTERNAL, policy=STREETS),
    _recipient("domain-that-postfix-folds-to-ours-a-label", "x@xn--strae-oqa.test", DUNNO, policy=STREETS),
    _recipient("domain-that-postfix-folds-to-others", "x@straße.test", DUNNO),
    _recipient(
        "domain-that-postfix-folds-to-the-mailbox-domain", "x@straße.test", INTERNAL, policy=_with(mailbox_domain="strasse.test")
    ),
    _recipient("domain-emoji", "x@😀.test", DUNNO),
    _recipient("joiner-unknown", "ali\u200cce@d1.test", NO_SUCH_USER),
    _recipient("joiner-outage", "ali\u200cce@d1.test", DIRECTORY, keycloak="down"),
    _recipient("persian", "می\u200cخواهم@d1.test", DUNNO),
    _recipient("newer-than-pythons-tables", "x\U000e0fff@d1.test", DUNNO),
    _recipient("mailbox-domain", "alice@mailbox.internal", NO_SUCH_USER, policy=MAILBOXES),
    _recipient("mailbox-domain-unset", "alice@mailbox.internal", DUNNO),
    _recipient("outage-primary", "alice@d1.test", DIRECTORY, keycloak="down"),
    _recipient("outage-stranger", "stranger@d1.test", DIRECTORY, keycloak="down"),
    _recipient("outage-alias", "info@d1.test", DUNNO, keycloak="down"),
    _recipient("outage-tagged-alias", "info+x@d1.test", DIRECTORY, keycloak="down"),
    _recipient("outage-alias-disabled", "old@d1.test", DIRECTORY, keycloak="down"),
    _recipient("outage-foreign", "x@elsewhere.test", DUNNO, keycloak="down"),
    _recipient("outage-recipients-pass", "stranger@d1.test", DUNNO, keycloak="down", policy=RECIPIENTS_PASS),
    _recipient("outage-all-pass", "stranger@d1.test", DUNNO, keycloak="down", policy=ALL_PASS),
    _recipient("database-broken-primary", "alice@d1.test", DUNNO, database="broken"),
    _recipient("database-broken-tagged-primary", "alice+x@d1.test", DUNNO, database="broken"),
    _recipient("database-broken-alias", "info@d1.test", INTERNAL, database="broken"),
    _recipient("database-broken-stranger", "stranger@d1.test", INTERNAL, database="broken"),
    _recipient("database-broken-foreign", "x@elsewhere.test", DUNNO, database="broken"),
    _recipient("both-broken", "alice@d1.test", DIRECTORY, database="broken", keycloak="down"),
    _recipient("both-broken-all-pass", "alice@d1.test", DUNNO, database="broken", keycloak="down", policy=ALL_PASS),
    # ---- section 4, senders without authentication
    _sender("null", "", DUNNO),
    _sender("foreign", "x@elsewhere.test", DUNNO),
    _sender("local", "alice@d1.test", UNAUTHENTICATED),
    _sender("local-stranger", "nobody@d1.test", UNAUTHENTICATED),
    _sender("local-any-case", "alice@D1.TEST", UNAUTHENTICATED),
    _sender("without-domain", "alice", UNAUTHENTICATED),
    _sender("at-only", "@", UNAUTHENTICATED),
    _sender("percent", "alice%d1.test", UNAUTHENTICATED),
    _sender("folded-domain-of-ours", "alice@strasse.test", INTERNAL, policy=_with(domain="straße.test")),
    _sender("folded-end-of-a-domain-of-ours", "alice@βόλοσ.test", INTERNAL, policy=_with(domain="βόλος.test")),
    _sender("bang", "d1.test!alice", UNAUTHENTICATED),
    _sender("trailing-dot", "alice@d1.test.", UNAUTHENTICATED),
    _sender("source-route", "@x.test:alice@d1.test", UNAUTHENTICATED),
    _sender("wide-dot", "alice@d1\u3002test", UNAUTHENTICATED),
    _sender("international-domain", "x@bücher.test", UNAUTHENTICATED),
    _sender("domain-not-convertible", "x@\u1e9e.test", INTERNAL),
    _sender("domain-not-convertible-dunno", "x@\u1e9e.test", INTERNAL, policy=_with(unauthenticated_local_sender="dunno")),
    _sender("domain-not-convertible-outage-all-pass", "x@\u1e9e.test", INTERNAL, keycloak="down", policy=ALL_PASS),
    _sender("domain-of-ours-and-many-ignored-signs", "alice@d1" + "\u00ad" * 255 + ".test", INTERNAL),
    _sender("domain-not-utf8", "alice@d1\udcff.test", INTERNAL),
    _sender("domain-that-postfix-folds-to-ours", "alice@straße.test", INTERNAL, policy=STREETS),
    _sender("domain-that-postfix-folds-to-others", "x@straße.test", DUNNO),
    _sender("domain-emoji", "x@😀.test", DUNNO),
    _sender("mailbox-domain", "alice@mailbox.internal", UNAUTHENTICATED, policy=MAILBOXES),
    _sender("mailbox-domain-any-case", "alice@Mailbox.Internal.", UNAUTHENTICATED, policy=MAILBOXES),
    _sender("mailbox-domain-null", "", DUNNO, policy=MAILBOXES),
    _sender("mailbox-domain-unset", "alice@mailbox.internal", DUNNO),
    _sender("local-warn", "alice@d1.test", DUNNO, policy=_with(unauthenticated_local_sender="warn")),
    _sender("local-dunno", "alice@d1.test", DUNNO, policy=_with(unauthenticated_local_sender="dunno")),
    _sender("local-outage", "alice@d1.test", UNAUTHENTICATED, keycloak="down"),
    _sender("method-without-username", "alice@d1.test", UNAUTHENTICATED, method="XOAUTH2"),
    # ---- section 4, apps
    _app("allowed", "printer", "scan@d1.test", DUNNO),
    _app("allowed-login-method", "printer", "scan@d1.test", DUNNO, method="LOGIN"),
    _app("allowed-scram", "printer", "SCAN@d1.test", DUNNO, method="SCRAM-SHA-256"),
    _app("allowed-no-method", "printer", "scan@d1.test", DUNNO, method=""),
    _app("name-any-case", "Printer", "scan@d1.test", DUNNO),
    _app("not-allowed", "printer", "alice@d1.test", NOT_OWNED),
    _app("tagged-not-allowed", "printer", "scan+x@d1.test", NOT_OWNED),
    _app("null-not-allowed", "printer", "", NOT_OWNED),
    _app("null-allowed", "shop", "", DUNNO),
    _app("domain-not-convertible", "printer", "scan@\u1e9e.test", INTERNAL),
    _app("foreign-allowed", "shop", "news@elsewhere.test", DUNNO),
    _app("foreign-not-allowed", "shop", "x@elsewhere.test", NOT_OWNED),
    _app("foreign-dunno-is-for-users-alone", "shop", "x@elsewhere.test", NOT_OWNED, policy=_with(foreign_sender="dunno")),
    _app("disabled", "oldapp", "old@d1.test", NOT_OWNED),
    _app("disabled-cannot-act-as-user", "oldapp", "oldapp@d1.test", NOT_OWNED),
    _app("cannot-act-as-user", "printer", "printer@d1.test", NOT_OWNED),
    _app("cannot-act-as-user-by-scram", "printer", "printer@d1.test", NOT_OWNED, method="SCRAM-SHA-256"),
    _app("expired", "trial", "scan@d1.test", NOT_OWNED),
    _app("owner-enabled", "owned", "scan@d1.test", DUNNO),
    _app("owner-enabled-not-allowed", "owned", "alice@d1.test", NOT_OWNED),
    _app("owner-missing", "orphan", "scan@d1.test", NOT_OWNED),
    _app("owner-disabled", "left", "scan@d1.test", NOT_OWNED),
    _app("owner-outage", "owned", "scan@d1.test", DIRECTORY, keycloak="down"),
    _app("owner-outage-all-pass", "owned", "scan@d1.test", DUNNO, keycloak="down", policy=ALL_PASS),
    _app("owner-outage-recipients-pass", "owned", "scan@d1.test", DIRECTORY, keycloak="down", policy=RECIPIENTS_PASS),
    _app("sender-not-utf8", "printer", "scan\udcff@d1.test", NOT_OWNED),
    _app("name-not-utf8", "printer\udcff", "scan@d1.test", NOT_OWNED),
    _app("outage", "printer", "scan@d1.test", DUNNO, keycloak="down"),
    _app("database-broken", "printer", "scan@d1.test", INTERNAL, database="broken"),
    _app("database-broken-user-by-password", "alice", "alice@d1.test", INTERNAL, database="broken"),
    # ---- section 4, users
    _token("own-primary", "alice", "alice@d1.test", DUNNO),
    _token("own-primary-oauthbearer", "alice", "alice@d1.test", DUNNO, method="OAUTHBEARER"),
    _token("own-primary-method-any-case", "alice", "alice@d1.test", DUNNO, method="xoauth2"),
    _token("own-primary-other-method", "alice", "alice@d1.test", DUNNO, method="PLAIN"),
    _token("own-primary-any-case", "ALICE", "Alice@d1.test", DUNNO),
    _token("own-tagged-primary", "alice", "alice+x@d1.test", DUNNO),
    _token("own-alias", "alice", "info@d1.test", DUNNO),
    _token("own-tagged-alias", "alice", "info+x@d1.test", DUNNO),
    _token("own-alias-stored-in-mixed-case", "bob", "sales@d2.test", DUNNO),
    _token("own-disabled-alias", "alice", "old@d1.test", NOT_OWNED),
    _token("own-disabled-tag", "alice", "off+tag@d1.test", NOT_OWNED),
    _token("tagged-alias-that-is-a-primary", "alice", "info+tina@d1.test", NOT_OWNED),
    _token("primary-that-looks-tagged", "tina", "info+tina@d1.test", DUNNO),
    _token("alias-goes-before-primary", "sam", "shadow@d1.test", NOT_OWNED),
    _token("alias-goes-before-primary-owner", "alice", "shadow@d1.test", DUNNO),
    _token("primary-goes-before-disabled-alias", "dis", "dis@d1.test", DUNNO),
    _token("disabled-alias-over-other-primary", "alice", "dis@d1.test", NOT_OWNED),
    _token("somebody-elses", "alice", "bob@d1.test", NOT_OWNED),
    _token("somebody-elses-percent", "alice", "bob%d1.test", NOT_OWNED),
    _token("somebody-elses-alias", "bob", "info@d1.test", NOT_OWNED),
    _token("nobodys", "alice", "stranger@d1.test", NOT_OWNED),
    _token("bare", "alice", "alice", NOT_OWNED),
    _token("null", "alice", "", DUNNO),
    _token("foreign", "alice", "x@elsewhere.test", NOT_OWNED),
    _token("foreign-own-primary", "frank", "frank@elsewhere.test", NOT_OWNED),
    _token("foreign-dunno", "alice", "x@elsewhere.test", DUNNO, policy=_with(foreign_sender="dunno")),
    _token("foreign-dunno-missing-user", "stranger", "x@elsewhere.test", NOT_OWNED, policy=_with(foreign_sender="dunno")),
    _token("domain-not-convertible", "alice", "alice@\u1e9e.test", INTERNAL),
    _token("domain-not-convertible-foreign-dunno", "alice", "x@\u1e9e.test", INTERNAL, policy=_with(foreign_sender="dunno")),
    _token(
        "mailbox-domain",
        "alice",
        "bob@mailbox.internal",
        NOT_OWNED,
        policy=_with(mailbox_domain="mailbox.internal", foreign_sender="dunno"),
    ),
    _token("own-persian", "mina", "می\u200cخواهم@d1.test", DUNNO),
    _token("alias-in-foreign-domain", "alice", "x@foreign.test", NOT_OWNED),
    _token("missing", "stranger", "alice@d1.test", NOT_OWNED),
    _token("missing-null", "stranger", "", NOT_OWNED),
    _token("disabled", "dora", "dora@d1.test", NOT_OWNED),
    _token("disabled-null", "dora", "", NOT_OWNED),
    _token("without-email", "noemail", "", NOT_OWNED),
    _token("service-account", "service-account-shop", "service@d1.test", NOT_OWNED),
    _token("email-as-login", "alice@d1.test", "alice@d1.test", DUNNO),
    _token("email-as-login-in-percent-form", "alice%d1.test", "alice@d1.test", NOT_OWNED),
    _token("email-as-login-in-source-route", "@x.test:alice@d1.test", "alice@d1.test", NOT_OWNED),
    _token("email-as-login-alias", "Alice@D1.test", "info@d1.test", DUNNO),
    _token("email-as-login-of-other", "alice@d1.test", "bob@d1.test", NOT_OWNED),
    _token("email-as-username", "erin@d1.test", "erin@d1.test", DUNNO),
    _token("email-as-username-alias", "erin@d1.test", "mail@d1.test", DUNNO),
    _token("name-of-one-email-of-another", "zed@d1.test", "zed@d1.test", NOT_OWNED),
    _token("name-of-one-email-of-another-first", "zed@d1.test", "other@d1.test", NOT_OWNED),
    _token("name-without-email-and-email-of-another", "noemail@d1.test", "noemail@d1.test", NOT_OWNED),
    _token("shared-primary", "twin1", "twin@d1.test", NOT_OWNED),
    _token("shared-primary-one-enabled", "half1", "half@d1.test", NOT_OWNED),
    _token("shared-primary-as-login", "twin@d1.test", "", NOT_OWNED),
    _token("international", "jürgen", "JÜRGEN@d1.test", DUNNO),
    _token("international-domain", "ulla", "ulla@xn--bcher-kva.test", DUNNO),
    _token("name-not-utf8", "alice\udcff", "alice@d1.test", NOT_OWNED),
    _token("name-over-long", "a" * 300, "alice@d1.test", NOT_OWNED),
    _token("app-name-by-token", "printer", "printer@d1.test", DUNNO),
    _token("app-name-by-token-app-sender", "printer", "scan@d1.test", NOT_OWNED),
    _token("outage-primary", "alice", "alice@d1.test", DIRECTORY, keycloak="down"),
    _token("outage-alias", "alice", "info@d1.test", DIRECTORY, keycloak="down"),
    _token("outage-alias-any-case", "Alice", "INFO@d1.test", DIRECTORY, keycloak="down"),
    _token("outage-other-method-alias", "alice", "info@d1.test", DIRECTORY, method="PLAIN", keycloak="down"),
    _token("outage-alias-recipients-pass", "alice", "info@d1.test", DIRECTORY, keycloak="down", policy=RECIPIENTS_PASS),
    _token("outage-alias-all-pass", "alice", "info@d1.test", DUNNO, keycloak="down", policy=ALL_PASS),
    _token("outage-others-alias", "bob", "info@d1.test", DIRECTORY, keycloak="down"),
    _token("outage-disabled-alias", "alice", "old@d1.test", DIRECTORY, keycloak="down"),
    _token("outage-null", "alice", "", DIRECTORY, keycloak="down"),
    _token("outage-foreign", "alice", "x@elsewhere.test", DIRECTORY, keycloak="down"),
    _token("outage-recipients-pass", "alice", "alice@d1.test", DIRECTORY, keycloak="down", policy=RECIPIENTS_PASS),
    _token("outage-all-pass", "alice", "bob@d1.test", DUNNO, keycloak="down", policy=ALL_PASS),
    _token("database-broken-primary", "alice", "alice@d1.test", DUNNO, database="broken"),
    _token("database-broken-tagged-primary", "alice", "alice+x@d1.test", INTERNAL, database="broken"),
    _token("database-broken-alias", "alice", "info@d1.test", INTERNAL, database="broken"),
    _token("database-broken-somebody-elses", "alice", "bob@d1.test", INTERNAL, database="broken"),
    # ---- section 4, states and contexts
    Row("state-data", {"protocol_state": "DATA", "recipient": "stranger@d1.test", "sender": "alice@d1.test"}, DUNNO),
    Row("state-end-of-message", {"protocol_state": "END-OF-MESSAGE", "sender": "alice@d1.test"}, DUNNO),
    Row("state-none", {"protocol_state": "", "recipient": "stranger@d1.test"}, DUNNO),
    Row("rcpt-both-recipient-first", {"recipient": "stranger@d1.test", "sender": "alice@d1.test"}, NO_SUCH_USER),
    Row("rcpt-both-sender-second", {"recipient": "bob@d1.test", "sender": "alice@d1.test"}, UNAUTHENTICATED),
    Row("rcpt-foreign-recipient-forged-sender", {"recipient": "x@elsewhere.test", "sender": "alice@d1.test"}, UNAUTHENTICATED),
    Row("context-recipient", {"recipient": "bob@d1.test", "sender": "alice@d1.test", "policy_context": "recipient"}, DUNNO),
    Row("context-recipient-stranger", {"recipient": "stranger@d1.test", "policy_context": "recipient"}, NO_SUCH_USER),
    Row("context-sender", {"recipient": "stranger@d1.test", "sender": "", "policy_context": "sender"}, DUNNO),
    Row(
        "context-sender-forged",
        {"recipient": "bob@d1.test", "sender": "alice@d1.test", "policy_context": "sender"},
        UNAUTHENTICATED,
    ),
    Row("context-other", {"recipient": "stranger@d1.test", "policy_context": "whatever"}, NO_SUCH_USER),
    Row("context-recipient-at-mail", {"protocol_state": "MAIL", "sender": "alice@d1.test", "policy_context": "recipient"}, DUNNO),
    # ---- section 5, the alias map
    _map("alias", "alias info@d1.test", "OK alice@d1.test"),
    _map("alias-any-case", "alias INFO@D1.test", "OK alice@d1.test"),
    _map("alias-domain-is-the-aliass", "alias sales@d2.test", "OK bob@d2.test"),
    _map("alias-tagged", "alias info+a+b@d1.test", "OK alice+a+b@d1.test"),
    _map("alias-empty-extension", "alias info+@d1.test", "OK alice+@d1.test"),
    _map("alias-dash", "alias info-x@d1.test", "OK alice-x@d1.test", policy=DASHES),
    _map("alias-disabled", "alias old@d1.test", "NOTFOUND "),
    _map("alias-disabled-exact-tag", "alias off+tag@d1.test", "NOTFOUND "),
    _map("alias-of-username-that-is-an-address", "alias mail@d1.test", "OK erin@d1.test"),
    _map("alias-of-username-that-is-an-address-tagged", "alias mail+x@d1.test", "OK erin@d1.test"),
    _map("alias-quoted-username", "alias spaced@d1.test", 'OK "two words"@d1.test'),
    _map("alias-over-primary", "alias shadow@d1.test", "OK alice@d1.test"),
    _map("primary", "alias alice@d1.test", "NOTFOUND "),
    _map("primary-that-looks-tagged", "alias info+tina@d1.test", "NOTFOUND "),
    _map("stranger", "alias stranger@d1.test", "NOTFOUND "),
    _map("postmaster-is-not-split", "alias postmaster@d1.test", "OK alice@d1.test"),
    _map("international-local-part", "alias büro@d1.test", "OK alice@d1.test"),
    _map("international-domain", "alias info@bücher.test", "OK hans@xn--bcher-kva.test"),
    _map("foreign", "alias x@foreign.test", "NOTFOUND "),
    _map("domain-not-convertible", "alias info@\u1e9e.test", "TEMP domain not convertible"),
    _map("domain-not-convertible-database-broken", "alias info@\u1e9e.test", "TEMP domain not convertible", database="broken"),
    _map("domain-that-postfix-folds-to-ours", "alias info@straße.test", "TEMP domain not convertible", policy=STREETS),
    _map("domain-that-postfix-folds-to-others", "alias info@straße.test", "NOTFOUND "),
    _map("domain-not-convertible-bare", "alias \u1e9e.test", "NOTFOUND "),
    _map("domain-not-convertible-quoted", 'alias "in fo"@\u1e9e.test', "TEMP domain not convertible"),
    _map("quoted-extension", 'alias "info+x."@d1.test', 'OK "alice+x."@d1.test'),
    _map("quoted-extension-with-quotes", 'alias "info+a\\"b"@d1.test', 'OK "alice+a\\"b"@d1.test'),
    _map("quoted-stranger", 'alias "stranger+x."@d1.test', "NOTFOUND "),
    _map("quoted-without-need", 'alias "info+x"@d1.test', "NOTFOUND "),
    _map("domain-not-convertible-alone", "alias @\u1e9e.test", "NOTFOUND "),
    _map("username-with-another-delimiter", "alias dash@d1.test", "OK anne-marie@d1.test"),
    _map("username-with-delimiter-of-two", "alias dash@d1.test", DELIMITER.format("anne-marie"), policy=DASHES),
    _map("username-with-delimiter", "alias plus@d1.test", DELIMITER.format("alice+x")),
    _map("username-with-delimiter-tagged", "alias plus+y@d1.test", DELIMITER.format("alice+x")),
    _map("username-with-delimiter-first", "alias leading@d1.test", DELIMITER.format("+alice")),
    _map("username-with-delimiter-no-delimiter", "alias plus@d1.test", "OK alice+x@d1.test", policy=_with(recipient_delimiter="")),
    _map("username-that-is-an-address-with-delimiter", "alias plus-address@d1.test", DELIMITER.format("erin+x@d2.test")),
    _map(
        "username-that-is-an-address-with-delimiter-in-its-domain", "alias dash-domain@d1.test", "OK erin@d-2.test", policy=DASHES
    ),
    _map("primary-of-username-with-delimiter", "alias lou@d1.test", "NOTFOUND "),
    _map("no-at", "alias info", "NOTFOUND "),
    _map("percent", "alias info%d1.test", "NOTFOUND "),
    _map("bare-domain", "alias d1.test", "NOTFOUND "),
    _map("domain-with-at", "alias @d1.test", "NOTFOUND "),
    _map("quoted", 'alias "info"@d1.test', "NOTFOUND "),
    _map("quoted-space", 'alias "in fo"@d1.test', "NOTFOUND "),
    _map("space", "alias in fo@d1.test", "NOTFOUND "),
    _map("comma", "alias info,bob@d1.test", "NOTFOUND "),
    _map("not-utf8", "alias info\udcff@d1.test", "NOTFOUND "),
    _map("no-key", "alias", "PERM no key"),
    _map("empty-key", "alias ", "PERM no key"),
    _map("unknown-map", "aliases info@d1.test", "PERM unknown map aliases"),
    _map("map-any-case-is-unknown", "Alias info@d1.test", "PERM unknown map Alias"),
    _map("nothing", "", "PERM unknown map "),
    _map("outage-alias", "alias info@d1.test", "OK alice@d1.test", keycloak="down"),
    _map("outage-stranger", "alias stranger@d1.test", "NOTFOUND ", keycloak="down"),
    _map("outage-tagged-alias", "alias info+x@d1.test", "TEMP lookup failed", keycloak="down"),
    _map("database-broken", "alias info@d1.test", "TEMP database not usable", database="broken"),
    _map("database-broken-foreign", "alias x@foreign.test", "NOTFOUND ", database="broken"),
    _map("mailboxes-alias", "alias info@d1.test", "OK alice@mailbox.internal", policy=MAILBOXES),
    _map("mailboxes-alias-tagged", "alias info+x@d1.test", "OK alice+x@mailbox.internal", policy=MAILBOXES),
    _map("mailboxes-primary", "alias zed@d1.test", "OK zoe@mailbox.internal", policy=MAILBOXES),
    _map("mailboxes-primary-tagged", "alias carol+x@d2.test", "OK carol+x@mailbox.internal", policy=MAILBOXES),
    _map("mailboxes-username-that-is-an-address", "alias erin@d1.test", "OK erin@d1.test", policy=MAILBOXES),
    _map("mailboxes-primary-of-username-with-delimiter", "alias lou@d1.test", DELIMITER.format("lou+2"), policy=MAILBOXES),
    _map("mailboxes-alias-of-username-with-delimiter", "alias plus@d1.test", DELIMITER.format("alice+x"), policy=MAILBOXES),
    _map("mailboxes-domain-not-convertible", "alias info@\u1e9e.test", "TEMP domain not convertible", policy=MAILBOXES),
    _map("mailboxes-stranger", "alias stranger@d1.test", "NOTFOUND ", policy=MAILBOXES),
    _map("mailboxes-disabled-user", "alias dora@d1.test", "NOTFOUND ", policy=MAILBOXES),
    _map("mailboxes-shared-primary", "alias twin@d1.test", "TEMP several users have twin@d1.test", policy=MAILBOXES),
    _map("mailboxes-own-domain", "alias alice@mailbox.internal", "NOTFOUND ", policy=MAILBOXES),
    _map("mailboxes-outage-alias", "alias info@d1.test", "OK alice@mailbox.internal", policy=MAILBOXES, keycloak="down"),
    _map("mailboxes-outage-primary", "alias alice@d1.test", "TEMP lookup failed", policy=MAILBOXES, keycloak="down"),
    _map(
        "mailboxes-database-broken-primary", "alias alice@d1.test", "TEMP database not usable", policy=MAILBOXES, database="broken"
    ),
]
