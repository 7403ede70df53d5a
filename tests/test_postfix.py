"""A real Postfix on the sample settings of examples/postfix, asking a daemon that was started as root and became nobody.

Three more ports beside the sample's port 25. Two show what the sample's own checks would hide:
open    accepts everything and asks nobody: shows where Postfix itself delivers an address, or to which sender it rewrites it.
alone   asks only mailcloak: there is no reject_non_fqdn_* and no reject_unauth_destination.
saving  asks mailcloak as seldom as the sample says that it may.
"""

import contextlib
import json
import os
import random
import re
import shutil
import smtplib
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, USERS, running, wait_until
from real.postfix import FORGED, NO_SUCH_USER, PATH, PrivatePostfix, daemon_behind, envelope, expected, send

import mailcloak
import mailcloakcommon

pytestmark = pytest.mark.real("postfix", "root")

TRUSTED = "127.0.0.2"  # in mynetworks, while 127.0.0.1 is not
OURS = ("d1.test", "d2.test")
ALIASES = {"info@d1.test": "alice", "news@d2.test": "bob", "postmaster@d1.test": "alice", "off@d1.test": "bob"}  # off is disabled
UNAVAILABLE = (451, "4.3.0 <{}>: Sender address rejected: Temporary lookup failure")

SERVICES = """\
127.0.0.1:{open} inet n - y - - smtpd
  -o mynetworks=127.0.0.0/8
  -o smtpd_sender_restrictions=
  -o smtpd_recipient_restrictions=
127.0.0.1:{alone} inet n - y - - smtpd
  -o mynetworks=127.0.0.0/8
  -o {{ smtpd_sender_restrictions = check_policy_service {{ unix:private/mailcloak, policy_context=sender }} }}
  -o {{ smtpd_recipient_restrictions = check_policy_service {{ unix:private/mailcloak, policy_context=recipient }} }}
127.0.0.1:{saving} inet n - y - - smtpd
  -o smtpd_reject_unlisted_recipient=no
  -o smtpd_sender_restrictions=reject_non_fqdn_sender
  -o {{ smtpd_recipient_restrictions = reject_non_fqdn_recipient, check_policy_service unix:private/mailcloak }}
"""


@pytest.fixture(scope="module")
def postfix():
    instance = PrivatePostfix(
        settings={
            "virtual_transport": "discard:",
            "mynetworks": f"{TRUSTED}/32",
            "myorigin": "d1.test",  # the worst case: what has no domain becomes ours
            "mydestination": "mx.test, localhost",  # as on nearly every host: $myhostname, localhost
        },
        services=SERVICES,
        ports=["open", "alone", "saving"],
    )
    with running(instance):
        yield instance


@pytest.fixture(scope="module")
def running_daemon(postfix):
    policy = {"domain": list(OURS), "recipient_delimiter": "+"}
    with running(daemon_behind(postfix, static_users=USERS, policy=policy)) as instance:
        for address, username in ALIASES.items():
            instance.ctl("aliases", "add", address, username)
        instance.ctl("aliases", "disable", "off@d1.test")
        yield instance


@pytest.fixture
def daemon(running_daemon):
    """The daemon of the module, running again after the test."""
    yield running_daemon
    if running_daemon.process.poll() is not None:
        running_daemon.start()


@pytest.fixture
def configure(postfix):
    """Postfix on a changed sample, and on the sample as it stands after the test."""

    def change(*uncommented, **options):
        postfix.configure(*uncommented, **options)
        postfix.restart()

    yield change
    postfix.configure()
    postfix.restart()


# ---- Recipients


@pytest.mark.parametrize(
    ("recipient", "mailbox"),
    [
        pytest.param("bob@d1.test", "bob@d1.test", id="primary"),
        pytest.param("Bob@D1.Test", "bob@d1.test", id="primary-in-mixed-case"),
        pytest.param("carol@d2.test", "carol@d2.test", id="primary-in-second-domain"),
        pytest.param("bob+tag@d1.test", "bob+tag@d1.test", id="tagged-primary"),
        pytest.param("info@d1.test", "alice@d1.test", id="alias"),
        pytest.param("INFO@D1.test", "alice@d1.test", id="alias-in-mixed-case"),
        pytest.param("news@d2.test", "bob@d2.test", id="alias-keeps-its-domain"),
        pytest.param("info+tag@d1.test", "alice+tag@d1.test", id="tagged-alias-keeps-its-tag"),
        pytest.param("postmaster", "alice@d1.test", id="bare-postmaster-is-an-alias"),
    ],
)
@pytest.mark.parametrize("sender", [pytest.param("x@elsewhere.test", id="foreign-sender"), pytest.param("", id="bounce")])
def test_recipient_with_an_owner_is_delivered_to_the_mailbox(postfix, daemon, sender, recipient, mailbox):
    (delivery,) = postfix.deliveries(postfix.send(sender, recipient))
    assert (delivery.recipient.lower(), delivery.status) == (mailbox, "sent")
    assert delivery.orig_to == ("" if recipient.lower() == mailbox else recipient)


@pytest.mark.parametrize(
    "recipient",
    [
        pytest.param("stranger@d1.test", id="stranger"),
        pytest.param("Stranger@D2.TEST", id="stranger-in-second-domain"),
        pytest.param("stranger+bob@d1.test", id="tagged-stranger"),
        pytest.param("bob@d2.test", id="local-part-of-another-domain"),
        pytest.param("off@d1.test", id="disabled-alias"),
    ],
)
@pytest.mark.parametrize("source", [pytest.param("127.0.0.1", id="any-client"), pytest.param(TRUSTED, id="client-in-mynetworks")])
def test_recipient_without_an_owner_is_refused_by_its_name(postfix, daemon, recipient, source):
    assert postfix.refusal("x@elsewhere.test", recipient, source=source) == expected(NO_SUCH_USER, recipient)


def test_refused_recipient_leaves_the_others_of_the_message(postfix, daemon):
    with postfix.smtp() as client:
        assert client.docmd("MAIL FROM:<x@elsewhere.test>")[0] == 250
        answers = [client.docmd(f"RCPT TO:<{recipient}@d1.test>")[0] for recipient in ("bob", "stranger", "info")]
        assert answers == [250, 550, 250]
        queue_id = re.search(r"queued as (\w+)", client.data("test\r\n")[1].decode()).group(1)
    assert {delivery.recipient for delivery in postfix.deliveries(queue_id)} == {"bob@d1.test", "alice@d1.test"}


def test_relay_attempt_is_refused_by_postfix(postfix, daemon):
    assert postfix.refusal("x@elsewhere.test", "y@third.test") == (554, "5.7.1 <y@third.test>: Relay access denied")


def test_client_in_mynetworks_may_relay(postfix, daemon):
    assert delivered_to(postfix, "y@third.test", source=TRUSTED) == "y@third.test"


@pytest.mark.parametrize("character", ["\x01", "\x08", "\x1b", "\x7f", "\xe9"], ids=lambda character: f"{ord(character):02x}")
def test_odd_character_in_a_recipient_is_refused_for_good_and_at_once(postfix, daemon, character):
    """451 here would be Postfix's word for a daemon that closed the connection without an answer."""
    with postfix.smtp() as client:
        client.command_encoding = "latin-1"
        with pytest.raises(smtplib.SMTPResponseException) as refused:
            envelope(client, "x@elsewhere.test", f"x{character}y@d1.test")
    assert 500 <= refused.value.smtp_code < 600


def test_postfix_that_asks_less_refuses_the_same(postfix, daemon):
    counts = [json.loads(daemon.ask_map("stats *")[3:])["answers"]]
    (delivery,) = postfix.deliveries(postfix.send("x@elsewhere.test", "info@d1.test", port="saving"))
    counts.append(json.loads(daemon.ask_map("stats *")[3:])["answers"])
    policy, socketmap = (
        [sum(each["count"] for each in those if each["service"] == name and each["reason"] != "stats") for those in counts]
        for name in ("policy", "socketmap")
    )
    assert (policy[1] - policy[0], socketmap[1] - socketmap[0]) == (1, 2)
    assert delivery.recipient == "alice@d1.test"
    assert postfix.refusal("x@elsewhere.test", "stranger@d1.test", port="saving") == expected(NO_SUCH_USER, "stranger@d1.test")
    code, text = postfix.refusal("bob@d1.test", "alice@d1.test", port="saving")
    assert (code, text.rpartition(": ")[2]) == (FORGED[0], FORGED[1].rpartition(": ")[2])


# ---- Senders


@pytest.mark.parametrize("sender", ["bob@d1.test", "Bob@D1.TEST", "bob+tag@d1.test", "info@d1.test", "stranger@d2.test"])
def test_local_sender_without_login_is_refused_by_its_name(postfix, daemon, sender):
    assert postfix.refusal(sender, "alice@d1.test") == expected(FORGED, sender)


def test_mynetworks_is_not_exempt_from_the_sender_part_by_default(postfix, daemon):
    assert postfix.refusal("bob@d1.test", "alice@d1.test", source=TRUSTED) == expected(FORGED, "bob@d1.test")


def test_mynetworks_with_permit_mynetworks_uncommented_is_exempt_from_the_sender_part_alone(postfix, daemon, configure):
    configure("permit_mynetworks,")
    assert postfix.refusal("bob@d1.test", "alice@d1.test", source=TRUSTED) is None
    assert postfix.refusal("bob@d1.test", "stranger@d1.test", source=TRUSTED) == expected(NO_SUCH_USER, "stranger@d1.test")
    assert postfix.refusal("bob@d1.test", "alice@d1.test") == expected(FORGED, "bob@d1.test")


# ---- Forms of an address that Postfix rewrites after the policy service has seen them. {} is the user; the id is the form.

DELIVERED = [  # also through the sample's own checks
    "{}@d1.test.",
    '"{}"@d1.test',
    "@x.test:{}@d1.test",
    "@x.test,@y.test:{}@d1.test",
    '"{}@d1.test"',
    '"@x.test:{}@d1.test"',
    '"@x.test:{}"@d1.test',
    "{}(comment)@d1.test",
    '{}@"d1.test"',
    "{} @ d1.test",
    "group:{}@d1.test;",
    "Name <{}@d1.test>",
]
NOT_DELIVERED = [  # to an existing user neither: refused by reject_non_fqdn_*, as relaying, for their syntax, or by mailcloak
    "{}",
    "{}.",
    "{}%d1.test",
    "d1.test!{}",
    "@x.test:{}",
    "@x.test:{}%d1.test",
    "@x.test:d1.test!{}",
    '"{}%d1.test"',
    '"d1.test!{}"',
    "{}%d1.test.",
    "{}%d1.test..",
    "d1.test!{}.",
    "d1.test.!{}",
    ".d1.test!{}",
    "a%{}%d1.test",
    "{}%d2.test%d1.test",
    "d2.test!x!{}",
    "d1.test!d1.test!{}",
    "d1.test!{}%x.test",
    "d1.test!{}%d1.test",
    "x.test!{}@d1.test",
    "{}%x.test@d1.test",
    "{}%d1.test@x.test",
    "d1.test!{}@x.test",
    "{}%d1.test%x.test",
    '"{}@x.test"@d1.test',
    '"{}@d1.test"@d1.test',
    '"{} "@d1.test',
    ":{}@d1.test",
    "{}@d1.test..",
    "{}@.d1.test",
    "{}@[d1.test]",
    "@d1.test",
    "%d1.test",
    "d1.test!",
]
# The domain is the host itself, which Postfix cuts off; what is left of it is then an address of its own.
ROUTED_THROUGH_THE_HOST = [
    "{}%d1.test@[127.0.0.1]",
    "d1.test!{}@[127.0.0.1]",
    '"{}@d1.test"@[127.0.0.1]',
    '"{}@d1.test."@[127.0.0.1]',
    "{}%d1.test%[127.0.0.1]",
    "{}%d1.test@[127.0.0.1].",
    "{}%d1.test%localhost@[127.0.0.1]",
    "{}%d1.test@localhost",
    "d1.test!{}@localhost",
    '"{}@d1.test"@localhost',
    "{}%d1.test@mx.test",
    "d1.test!{}@mx.test",
    '"{}@d1.test"@mx.test',
    "@d1.test:{}%d1.test@mx.test",
    "{}%d1.test%localhost",
]
FORMS = [*DELIVERED, *NOT_DELIVERED, *ROUTED_THROUGH_THE_HOST]


def is_ours(address):
    return address.lower().rpartition("@")[2] in OURS


def delivered_to(postfix, recipient, **options):
    """Where Postfix delivers mail for this recipient; None when it takes none."""
    try:
        queue_id = postfix.send("x@elsewhere.test", recipient, **options)
    except smtplib.SMTPResponseException as exc:
        assert 500 <= exc.smtp_code < 600, f"neither taken nor refused: {exc}"
        return None
    (delivery,) = postfix.deliveries(queue_id)
    return delivery.recipient


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "way",
    [
        pytest.param({}, id="sample"),
        pytest.param({"source": TRUSTED}, id="sample-client-in-mynetworks"),
        pytest.param({"port": "alone"}, id="mailcloak-alone"),
    ],
)
def test_address_form_as_recipient_reaches_no_mailbox_that_nobody_owns(postfix, daemon, form, way):
    for user in ("bob", "stranger"):
        mailbox = delivered_to(postfix, form.format(user), **way)
        assert mailbox is None or mailbox == "bob@d1.test" or not is_ours(mailbox), f"delivered to <{mailbox}>"
        assert mailbox is None or not (is_ours(mailbox) and user == "stranger")


@pytest.mark.parametrize("form", DELIVERED)
def test_address_form_of_an_existing_user_is_delivered(postfix, daemon, form):
    assert delivered_to(postfix, form.format("bob")) == "bob@d1.test"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("port", [pytest.param("smtp", id="sample"), pytest.param("alone", id="mailcloak-alone")])
def test_address_form_as_sender_does_not_come_out_as_one_of_ours(postfix, daemon, form, port):
    sender = form.format("bob")
    try:
        queue_id = postfix.send(sender, "alice@d1.test", port=port)
    except smtplib.SMTPResponseException as exc:
        assert 500 <= exc.smtp_code < 600, f"neither taken nor refused: {exc}"
    else:
        assert not is_ours(postfix.envelope_sender(queue_id))


class Resolver:
    """Postfix's trivial-rewrite(8), asked as its other programs ask it."""

    def __init__(self, path):
        self._path = str(path)
        self._connect()

    def _connect(self):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(self._path)
        self.socket.recv(4096)  # the name of its protocol

    def resolve(self, address):
        """(is it in virtual_mailbox_domains?, recipient), None where it ends the connection."""
        self.socket.sendall(b"request\0resolve\0sender\0\0address\0" + address.encode() + b"\0\0")
        answer = b""
        while not answer.endswith(b"\0\0"):
            data = self.socket.recv(65536)
            if not data:
                self.socket.close()
                self._connect()
                return None
            answer += data
        parts = answer.split(b"\0")
        found = dict(zip(parts[::2], parts[1::2]))
        return bool(int(found[b"flags"]) & 1 << 10), found[b"recipient"].decode(errors="replace")  # RESOLVE_CLASS_VIRTUAL


class NobodyThere:
    """Facts where no address of ours has an owner."""

    def find_alias(self, address):
        return None

    def find_holders(self, address):
        return ()


PARTS = [
    "a",
    "b",
    "+",
    " ",
    "%",
    "%",
    "!",
    "@",
    "@",
    "d1.test",
    "d1.test",
    "mx.test",
    "[127.0.0.1]",
    '"',
    "\\",
    "(",
    ")",
    ",",
    ":",
    ";",
]
PARTS += ["<", ">", ".", "\u00e9", "[", "]", "D1.TEST", "d1.test.", "\uff441.test", "mx.test."]


def test_no_form_of_an_address_leads_postfix_to_a_domain_of_ours_and_mailcloak_elsewhere(postfix):
    """Each form that Postfix delivers to one of our domains is checked: with nobody there, it is refused or deferred."""
    policy = mailcloak.PolicyConfig(domain=frozenset(OURS), recipient_delimiter="+")
    choices, resolver, ours = random.Random(7), Resolver(postfix.private / "rewrite"), 0
    with contextlib.closing(resolver.socket):
        for _ in range(20_000):
            address = "".join(choices.choice(PARTS) for _ in range(choices.randrange(2, 7)))
            found = resolver.resolve(address)
            if found and found[0]:
                ours += 1
                action = mailcloak.decide_recipient(address, policy, NobodyThere())
                assert action.text.startswith(("550", "451")), (address, found, action)
    assert ours > 500


@pytest.mark.parametrize(
    ("form", "rewritten"),
    [
        pytest.param("bob", "bob@d1.test", id="bare"),
        pytest.param("bob@d1.test.", "bob@d1.test", id="trailing-dot"),
        pytest.param("bob%d1.test", "bob@d1.test", id="percent"),
        pytest.param("d1.test!bob", "bob@d1.test", id="bang"),
        pytest.param("bob%d1.test@[127.0.0.1]", "bob@d1.test", id="through-the-host"),
    ],
)
def test_postfix_without_mailcloak_delivers_these_forms(postfix, daemon, form, rewritten):
    """Else the tests above would hold for a Postfix that refuses or keeps such forms by itself, and would show nothing."""
    assert delivered_to(postfix, form, port="open") == rewritten


# ---- Mail by sendmail(1), which meets no smtpd but the one that master.cf leads it to


def submit(postfix, sender, recipient):
    """Hand in a message as cron and PHP do; what its smtpd makes of it: (status, why)."""
    already = len(postfix.log())
    program = shutil.which("sendmail", path=PATH)
    command = [program, "-C", str(postfix.config), "-f", sender, recipient]
    subprocess.run(command, input="Subject: test\n\ntest\n", text=True, check=True, timeout=30, env={"PATH": PATH})
    line = rf": to=<{re.escape(recipient)}>, relay=127\.0\.0\.1\S*:{postfix.ports['sendmail']}, .*status=(\w+) \((.*)\)"
    found = wait_until(lambda: re.search(line, postfix.log()[already:]), what=f"delivery of {recipient} by sendmail(1)")
    return found[1], found[2]


@pytest.mark.parametrize(
    ("sender", "recipient", "status", "reason"),
    [
        pytest.param("root@mx.test", "bob@d1.test", "sent", "Ok: queued as", id="user"),
        pytest.param("root@mx.test", "info+tag@d1.test", "sent", "Ok: queued as", id="alias"),
        pytest.param("root@mx.test", "y@third.test", "sent", "Ok: queued as", id="elsewhere"),
        pytest.param("root@mx.test", "stranger@d1.test", "bounced", "550 5.1.1 <stranger@d1.test>: Recipient", id="stranger"),
        pytest.param("bob@d1.test", "alice@d1.test", "bounced", "553 5.7.1 <bob@d1.test>: Sender address", id="as-one-of-ours"),
    ],
)
def test_mail_by_sendmail_is_checked_as_all_other_mail(postfix, daemon, sender, recipient, status, reason):
    became, said = submit(postfix, sender, recipient)
    assert became == status
    assert reason in said


def test_bounce_of_mail_by_sendmail_goes_to_its_forged_sender_though_nobody_has_the_address(postfix, daemon):
    already = len(postfix.log())
    assert submit(postfix, "stranger@d1.test", "bob@d1.test")[0] == "bounced"
    log = wait_until(
        lambda: re.search(r": to=<stranger@d1\.test>, .*status=sent", postfix.log()[already:]) and postfix.log()[already:]
    )
    queue_id = re.search(r"(\w+): to=<stranger@d1\.test>, .*status=sent", log)[1]
    assert f"{queue_id}: from=<>" in log


def test_authorized_submit_users_of_the_sample_closes_sendmail_for_all_others(postfix):
    """Only root may name another configuration than /etc/postfix: so this one is there, for the command alone."""
    name, users = re.search(r"^#(authorized_submit_users) = (.*)$", postfix.sample("main.cf"), re.MULTILINE).groups()
    as_user = 'mount --bind "$1" /etc/postfix && exec setpriv --reuid "$2" --regid nogroup --clear-groups sendmail -f bob@d1.test bob@d1.test'

    def submit_as(user):
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", as_user, "sh", postfix.config, user]
        result = subprocess.run(command, input="x\n", capture_output=True, text=True, check=False, timeout=30, env={"PATH": PATH})
        return result.stderr

    before = postfix.postconf(name)
    postfix.set(**{name: users})
    try:
        assert submit_as("nobody") == "sendmail: fatal: User nobody(65534) is not allowed to submit mail\n"
        assert "not allowed" not in submit_as(users)
    finally:
        postfix.set(**{name: before})


def test_mail_by_sendmail_for_an_alias_goes_to_its_mailbox(postfix, daemon):
    """The mailbox is no address of its own (carol's e-mail is another), so it must not be asked about in place of the alias."""
    daemon.ctl("aliases", "add", "desk@d1.test", "nobodys.name")
    queue_id = re.search(r"queued as (\w+)", submit(postfix, "root@mx.test", "desk@d1.test")[1])[1]
    assert [delivery.recipient for delivery in postfix.deliveries(queue_id)] == ["nobodys.name@d1.test"]


def test_mail_by_sendmail_waits_while_the_daemon_is_stopped(postfix, daemon):
    daemon.stop()
    became, said = submit(postfix, "root@mx.test", "bob@d2.test")
    assert became == "deferred"
    assert "451 4.3.0" in said


def test_first_message_of_the_readme_is_checked_and_delivered(postfix, daemon):
    code = re.search(r"""# python3 -c '(import smtplib; .*)'$""", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    code = code.replace('SMTP("localhost")', f'SMTP("127.0.0.1", {postfix.port})')

    def run(address):
        already = len(postfix.log())
        command = [sys.executable, "-c", code.replace("alice@example.org", address)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        return result.returncode, result.stderr, postfix.log()[already:]

    assert run("alice@d1.test")[:2] == (0, "")
    assert wait_until(lambda: "to=<alice@d1.test>" in postfix.log())
    code_, said, _ = run("stranger@d1.test")
    assert code_ == 1
    assert "550, b'5.1.1 <stranger@d1.test>: Recipient address rejected: No such user'" in said


# ---- The socketmap by hand


@pytest.fixture
def table(postfix):
    return f"socketmap:unix:{postfix.private}/mailcloak-socketmap:alias"


@pytest.mark.parametrize(
    ("key", "result"),
    [
        pytest.param("info@d1.test", (0, "alice@d1.test", ""), id="alias"),
        pytest.param("Info+tag@d1.test", (0, "alice+tag@d1.test", ""), id="tagged-alias"),
        pytest.param("bob@d1.test", (1, "", ""), id="primary-is-no-alias"),
        pytest.param("off@d1.test", (1, "", ""), id="disabled-alias"),
        pytest.param("info@elsewhere.test", (1, "", ""), id="domain-of-others"),
    ],
)
def test_postmap_query_gets_the_answer_of_the_alias_map(postfix, daemon, table, key, result):
    assert postfix.postmap(key, table) == result


def test_postmap_query_for_a_mistyped_map_name_is_an_error_and_not_a_miss(postfix, daemon, table):
    code, value, message = postfix.postmap("info@d1.test", f"{table}es")
    assert (code, value) == (1, "")
    assert "unknown map aliases" in message


def test_database_gone_defers_aliases_until_it_is_back(postfix, daemon, table):
    away = daemon.database.with_name("away")
    daemon.database.rename(away)
    try:
        code, value, message = postfix.postmap("info@d1.test", table)
        assert (code, value) == (1, "")
        assert "database not usable" in message
        answer = postfix.refusal("x@elsewhere.test", "info@d1.test")
        assert answer == (451, "4.3.0 <info@d1.test>: Recipient address rejected: Temporary internal error")
    finally:
        away.rename(daemon.database)
    assert delivered_to(postfix, "info@d1.test") == "alice@d1.test"


# ---- Many recipients, restarts, outages


@pytest.mark.parametrize("count", [2, mailcloakcommon.MAX_TARGETS])
def test_message_to_an_alias_with_several_targets_goes_to_each(postfix, daemon, count):
    """1,000 is Postfix's virtual_alias_expansion_limit, which mailcloakctl does not let an alias exceed."""
    targets = ["alice", "bob", *(f"user{number}@elsewhere.test" for number in range(count - 2))]
    daemon.ctl("aliases", "add", f"all{count}@d1.test", *targets, "--external")
    deliveries = postfix.deliveries(postfix.send("x@elsewhere.test", f"all{count}@d1.test"))
    mailboxes = {target if "@" in target else f"{target}@d1.test" for target in targets}
    assert {delivery.recipient for delivery in deliveries} == mailboxes
    assert len(deliveries) == count


def test_message_to_50_recipients_is_taken_without_a_wait_for_each(postfix, daemon, capsys):
    recipients = [f"bob+{number}@d1.test" for number in range(25)] + [f"info+{number}@d1.test" for number in range(25)]
    with postfix.smtp() as client:
        started = time.monotonic()
        queue_id = send(client, "x@elsewhere.test", *recipients)
        elapsed_seconds = time.monotonic() - started
    with capsys.disabled():
        print(f" 50 recipients: {elapsed_seconds:.2f} s ", end="")
    assert len(postfix.deliveries(queue_id)) == 50
    assert elapsed_seconds < 10  # 0.1 s is usual; a daemon that closes after each answer takes 50 s


def restart(daemon):
    assert daemon.stop() == 0
    daemon.start()


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda postfix, daemon: postfix.reload(), id="postfix-reload"),
        pytest.param(lambda postfix, daemon: restart(daemon), id="daemon-restart"),
        pytest.param(lambda postfix, daemon: daemon.reload(), id="daemon-reload"),
    ],
)
def test_messages_before_and_after_a_disturbance_are_all_delivered(postfix, daemon, disturb):
    with postfix.smtp() as client:
        queue_ids = [send(client, "x@elsewhere.test", "bob@d1.test", "info@d1.test")]
        disturb(postfix, daemon)
        with contextlib.suppress(smtplib.SMTPServerDisconnected):  # Postfix may end the session between two messages at a reload
            queue_ids.append(send(client, "x@elsewhere.test", "bob@d1.test", "info@d1.test"))
    queue_ids.append(postfix.send("x@elsewhere.test", "bob@d1.test", "info@d1.test"))
    for queue_id in queue_ids:
        delivered = {(delivery.recipient, delivery.status) for delivery in postfix.deliveries(queue_id)}
        assert delivered == {("bob@d1.test", "sent"), ("alice@d1.test", "sent")}


def test_message_whose_recipient_was_taken_before_a_daemon_restart_is_delivered(postfix, daemon):
    with postfix.smtp() as client:
        envelope(client, "x@elsewhere.test", "info@d1.test")
        restart(daemon)
        code, text = client.data("test\r\n")
    assert code == 250
    queue_id = re.search(r"queued as (\w+)", text.decode()).group(1)
    assert [delivery.recipient for delivery in postfix.deliveries(queue_id)] == ["alice@d1.test"]


@pytest.mark.parametrize("recipient", ["bob@d1.test", "info@d1.test", "stranger@d1.test"])
def test_daemon_stopped_defers_every_recipient(postfix, daemon, recipient):
    daemon.stop()
    assert postfix.refusal("x@elsewhere.test", recipient) == expected(UNAVAILABLE, "x@elsewhere.test")


def test_daemon_stopped_defers_the_recipient_also_where_the_sender_is_exempt(postfix, daemon, configure):
    configure("permit_mynetworks,")
    daemon.stop()
    answer = postfix.refusal("x@elsewhere.test", "bob@d1.test", source=TRUSTED)
    assert answer == (451, "4.3.0 <bob@d1.test>: Recipient address rejected: Temporary lookup failure")


# ---- The sample itself


def test_warn_if_reject_uncommented_refuses_nothing_and_logs_what_it_would_have(postfix, daemon, configure):
    configure("warn_if_reject", commented=["virtual_alias_maps"])
    already = len(postfix.log())
    assert delivered_to(postfix, "stranger@d1.test") == "stranger@d1.test"
    assert postfix.refusal("bob@d1.test", "alice@d1.test") is None
    daemon.stop()
    assert delivered_to(postfix, "bob@d1.test") == "bob@d1.test"
    warnings = re.findall(r"reject_warning: RCPT from \S+: (\d+ \S+ <.*?>: .*?);", postfix.log()[already:])
    assert "550 5.1.1 <stranger@d1.test>: Recipient address rejected: No such user" in warnings
    assert any(warning.startswith("553 5.7.1 <bob@d1.test>: Sender address rejected: ") for warning in warnings)
    assert "451 4.3.0 <bob@d1.test>: Recipient address rejected: Temporary lookup failure" in warnings


def test_sample_works_without_chroot_as_with_it(postfix, daemon, configure):
    configure(chroot="n")
    assert delivered_to(postfix, "info@d1.test") == "alice@d1.test"
    assert postfix.refusal("x@elsewhere.test", "stranger@d1.test") == expected(NO_SUCH_USER, "stranger@d1.test")


def test_sample_is_taken_by_postfix_without_a_complaint(postfix):
    assert postfix.complaints() == ""


# ---- The daemon beside it


def test_daemon_started_as_root_becomes_nobody_and_its_sockets_belong_to_postfix(postfix, daemon):
    ids = re.search(r"^Uid:\s+(.*)$", Path(f"/proc/{daemon.process.pid}/status").read_text(), re.MULTILINE).group(1).split()
    assert ids == [str(daemon.database.parent.stat().st_uid)] * 4  # nobody's: the directory was given to it
    assert stat.S_IMODE(postfix.private.stat().st_mode) == 0o700
    for path in ("mailcloak", "mailcloak-socketmap"):
        status = (postfix.private / path).stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (postfix.private.stat().st_uid, 0o660)
        assert os.geteuid() != status.st_uid


def test_daemon_that_could_not_remove_its_sockets_starts_again_and_says_so(postfix, daemon):
    already = len(daemon.log())
    restart(daemon)
    wait_until(lambda: daemon.log()[already:].count("daemon: started") == 1)
    log = daemon.log()[already:]
    for path in (postfix.private / "mailcloak", postfix.private / "mailcloak-socketmap"):
        assert f"server: socket left behind path={path} " in log
        assert f"server: stale socket removed path={path}\n" in log
    assert delivered_to(postfix, "info@d1.test") == "alice@d1.test"
