"""Outages of real servers: Keycloak stopped and killed under load through Postfix, LDAP away behind Keycloak, users locked out."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import _find_program, running, wait_until
from real.keycloak import PASSWORD, PrivateKeycloak, service_client, user
from real.ldap import PrivateSlapd, federate
from real.postfix import PrivatePostfix, daemon_behind
from test_outages import DEFER, NOT_OWNED, REJECT, SHORT

pytestmark = [pytest.mark.real("keycloak"), pytest.mark.timeout(600)]

SECRET = "a-client-secret-of-the-tests"
CLIENT, ACCOUNT = service_client("mailcloak", SECRET, "view-users")


def block(keycloak, realm, **more):
    """The keycloak block of a daemon's configuration."""
    return {"base_url": keycloak.url, "realm": realm, "client_id": "mailcloak", "client_secret": SECRET, **more}


def address(username):
    return f"{username}@d1.test"


def own(username):
    """The attributes of a user who sends from their own address."""
    return {"protocol_state": "MAIL", "sender": address(username), "sasl_username": username, "sasl_method": "XOAUTH2"}


def ask(daemon, *usernames):
    """What the daemon says to mail for these users."""
    return [daemon.ask(recipient=address(username)) for username in usernames]


def ask_senders(daemon, *usernames):
    """What it says to mail from these users' own addresses."""
    return [daemon.ask(**own(username)) for username in usernames]


# ---- Keycloak stopped and killed under a load

RECIPIENTS, SESSIONS, MESSAGES = 5, 10, 120  # recipients of a message; a session sends one message a second
RCPT = "user@d1.test"  # the last; smtp-source puts numbers before the others


class Load:
    """smtp-source at work. It ends with an error at the first refusal, a temporary one too."""

    def __init__(self, postfix):
        self._postfix = postfix
        self._before = self.delivered_in_log()
        command = [_find_program("smtp-source"), "-s", str(SESSIONS), "-m", str(MESSAGES), "-w", "1", "-r", str(RECIPIENTS)]
        command += ["-f", "sender@elsewhere.test", "-t", RCPT, "-M", "client.test", f"127.0.0.1:{postfix.port}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def delivered_in_log(self):
        return len(re.findall(r"relay=.*status=sent", self._postfix.log()))

    @property
    def delivered(self):
        """To how many recipients so far."""
        return self.delivered_in_log() - self._before

    def wait_for_more(self, what):
        """Until mail has been taken and delivered that came in from now on."""
        wanted = self.delivered + 2 * SESSIONS * RECIPIENTS
        assert self.process.poll() is None, "the load was over too soon to show anything"
        wait_until(lambda: self.process.poll() is not None or self.delivered >= wanted, 15, what=what)
        assert self.delivered >= wanted, self._end()

    def _end(self):
        return f"{self.process.communicate(timeout=60)[0]}{self._postfix.log()[-2000:]}"

    def finish(self):
        """All was taken and all was delivered."""
        output = self.process.communicate(timeout=60)[0]
        assert self.process.returncode == 0, f"{output}{self._postfix.log()[-2000:]}"
        wait_until(lambda: self.delivered >= MESSAGES * RECIPIENTS, what="delivery of everything")
        assert self.delivered == MESSAGES * RECIPIENTS
        wait_until(lambda: not self._postfix.queue(), what="empty queue")


@pytest.fixture(scope="module")
def mortal_keycloak():
    """A Keycloak of this module's own, to be stopped and killed."""
    with running(PrivateKeycloak()) as server:
        numbered = [f"{number}user" for number in range(1, RECIPIENTS + 1)]
        users = [{"username": name, "email": address(name), "enabled": True} for name in ("user", *numbered)]
        server.create_realm("load", [*users, ACCOUNT], [CLIENT])
        yield server


@pytest.fixture(scope="module")
def postfix():
    with running(PrivatePostfix(settings={"virtual_transport": "discard:"})) as instance:
        yield instance


@pytest.fixture(scope="module")
def mail_daemon(mortal_keycloak, postfix):
    """The daemon behind that Postfix, which remembers answers for a moment only."""
    keycloak, policy = block(mortal_keycloak, "load", timeout_seconds=1), {**SHORT, "disappearance_grace_seconds": 3600}
    with running(daemon_behind(postfix, keycloak=keycloak, policy=policy)) as instance:
        yield instance


def refusal_code(postfix, recipient):
    """The code by which Postfix refuses a recipient; None if it accepts the recipient."""
    refusal = postfix.refusal("sender@elsewhere.test", recipient)
    return refusal[0] if refusal else None


def count_log(daemon, text):
    return daemon.log().count(text)


@pytest.mark.long
@pytest.mark.real("postfix", "root")
def test_keycloak_stopped_and_killed_under_load_loses_no_mail_and_refuses_none(mortal_keycloak, mail_daemon, postfix):
    assert refusal_code(postfix, "stranger@d1.test") == 550

    load = Load(postfix)
    load.wait_for_more("mail before the outage")
    os.killpg(mortal_keycloak.process.pid, signal.SIGSTOP)
    try:
        mail_daemon.wait_for_log("warning directory: realm 'load': ")
        load.wait_for_more("mail while Keycloak is stopped")
        assert refusal_code(postfix, "stranger@d1.test") == 451
    finally:
        os.killpg(mortal_keycloak.process.pid, signal.SIGCONT)
    mail_daemon.wait_for_log("answers again")
    load.finish()
    wait_until(lambda: refusal_code(postfix, "stranger@d1.test") == 550)

    load = Load(postfix)
    load.wait_for_more("mail before the end of Keycloak")
    os.killpg(mortal_keycloak.process.pid, signal.SIGKILL)
    mortal_keycloak.process.wait(20)
    load.wait_for_more("mail after the end of Keycloak")
    assert refusal_code(postfix, "stranger@d1.test") == 451
    load.finish()

    mail_daemon.stop()
    mail_daemon.start()
    load = Load(postfix)
    load.finish()
    assert refusal_code(postfix, "stranger@d1.test") == 451

    refused = re.findall(r"reject: RCPT from \S+: (\d+) .*?to=<(.*?)>", postfix.log())
    assert {recipient for _, recipient in refused} == {"stranger@d1.test"}
    assert "Traceback" not in mail_daemon.log()


# ---- LDAP away

CACHE_POLICIES = ("DEFAULT", "NO_CACHE")
ROLES = ("seen", "imported", "unseen")  # by the daemon; by Keycloak alone; by neither
KINDS = ("plain", "canaries", "moment")


class Realm:
    """A realm that is federated with slapd. What is in LDAP is there once for each test: users are imported once."""

    def __init__(self, keycloak, slapd, cache_policy):
        self.keycloak, self.slapd = keycloak, slapd
        self.name = f"ldap-{cache_policy.lower().replace('_', '-')}"
        locals_ = [user(name, address(name)) for name in ("local", "local-unseen", "canary-local")]
        keycloak.create_realm(self.name, [*locals_, ACCOUNT], [CLIENT])
        federate(keycloak, self.name, slapd, cache_policy)

    def find(self, username):
        """What Keycloak says about the user, asked as the daemon does; this imports the user."""
        query = {"email": address(username), "exact": "true", "briefRepresentation": "true"}
        return self.keycloak.admin("GET", f"/{self.name}/users", **query)


@pytest.fixture(scope="module")
def running_slapd():
    names = ["canary", *(f"{role}-{kind}" for role in ROLES for kind in KINDS)]
    with running(PrivateSlapd({name: address(name) for name in names})) as server:
        yield server


@pytest.fixture
def slapd(running_slapd):
    """The slapd of the module, running again after the test."""
    yield running_slapd
    if running_slapd.process.poll() is not None:
        running_slapd.start()


@pytest.fixture(scope="module")
def realms(real_keycloak, running_slapd):
    return {cache_policy: Realm(real_keycloak, running_slapd, cache_policy) for cache_policy in CACHE_POLICIES}


@pytest.fixture(params=CACHE_POLICIES)
def realm(request, realms, slapd):
    return realms[request.param]


@pytest.fixture
def start_daemon(make_daemon, realm):
    """A factory of daemons on the realm that remember for a moment only."""

    def start(**more):
        policy = {**SHORT, "disappearance_grace_seconds": 3600}
        return make_daemon(keycloak=block(realm.keycloak, realm.name, **more), policy=policy).start()

    return start


def answers_for(seconds, question):
    """All answers that come while it is asked again and again for this long."""
    found, deadline = set(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        found.update(question())
    return found


@pytest.mark.real("slapd")
def test_ldap_away_without_canaries_nobody_the_daemon_has_seen_is_refused(start_daemon, realm):
    daemon = start_daemon()
    assert ask(daemon, "seen-plain", "local") == ask_senders(daemon, "seen-plain", "local") == ["DUNNO"] * 2
    assert ask(daemon, "stranger") == [REJECT]

    def question():
        return [*ask(daemon, "seen-plain", "local"), *ask_senders(daemon, "seen-plain", "local")]

    realm.slapd.stop()
    assert answers_for(3, question) <= {"DUNNO", DEFER}
    daemon.stop()
    daemon.start()
    assert answers_for(3, question) <= {"DUNNO", DEFER}
    assert ask(daemon, "local") == ask_senders(daemon, "local") == ["DUNNO"]

    realm.slapd.start()
    wait_until(lambda: question() == ["DUNNO"] * 4, what="service as before")
    wait_until(lambda: ask(daemon, "stranger") == [REJECT], what="refusal of strangers as before")
    assert ask(daemon, "unseen-plain") == ["DUNNO"]


@pytest.mark.parametrize("realm", ["NO_CACHE"], indirect=True)  # with DEFAULT Keycloak answers for the canary from its cache
@pytest.mark.real("slapd")
def test_ldap_away_with_canaries_nobody_at_all_is_refused(start_daemon, realm):
    assert realm.find("canary")
    assert realm.find("canary")  # from the second time Keycloak has this user in its cache, if the cache policy allows it
    daemon = start_daemon(canary=[address("canary"), address("canary-local")])
    known, unknown = ("seen-canaries", "local"), ("imported-canaries", "unseen-canaries", "local-unseen", "stranger")
    assert ask(daemon, *known) == ask_senders(daemon, *known) == ["DUNNO"] * 2
    assert realm.find("imported-canaries")
    realm.slapd.stop()

    def question():
        return [*ask(daemon, *known, *unknown), *ask_senders(daemon, *known, *unknown)]

    assert answers_for(8, question) <= {"DUNNO", DEFER}
    assert ask(daemon, *known) == ask_senders(daemon, *known) == ["DUNNO"] * 2
    assert ask(daemon, "unseen-canaries", "stranger") == [DEFER] * 2

    realm.slapd.start()
    wait_until(lambda: ask(daemon, "stranger") == [REJECT], what="refusal of strangers as before")
    everybody = (*known, *unknown[:3])
    assert ask(daemon, *everybody) == ask_senders(daemon, *everybody) == ["DUNNO"] * 5
    assert ask_senders(daemon, "stranger") == [NOT_OWNED]


@pytest.mark.parametrize("realm", ["NO_CACHE"], indirect=True)
@pytest.mark.real("slapd")
def test_ldap_away_a_moment_after_the_canaries_were_asked_nobody_is_refused(start_daemon, realm):
    daemon = start_daemon(canary=[address("canary"), address("canary-local")])
    assert ask(daemon, "seen-moment") == ["DUNNO"]
    assert realm.find("imported-moment")
    assert ask(daemon, "stranger") == [REJECT]  # believed because the canaries answered just now
    realm.slapd.stop()
    assert ask(daemon, "seen-moment")[0] in ("DUNNO", DEFER)
    assert ask(daemon, "imported-moment")[0] in ("DUNNO", DEFER)
    assert ask(daemon, "unseen-moment") == [DEFER]


# ---- Lockout

FAILURES = 3


@pytest.fixture(scope="module")
def lockout_realm(real_keycloak):
    users = [user(name, address(name)) for name in ("known", "unknown", "dismissed", "free")]
    protection = {
        "bruteForceProtected": True,
        "permanentLockout": True,
        "failureFactor": FAILURES,
        "quickLoginCheckMilliSeconds": 1,
    }
    real_keycloak.create_realm("lockout", [*users, ACCOUNT], [CLIENT], **protection)
    return "lockout"


def lock_out(keycloak, realm, username):
    """Guess passwords until Keycloak has locked the user out."""
    form = {"grant_type": "password", "client_id": "mail-program", "username": username, "password": "a wrong guess"}

    def locked_out():
        with pytest.raises(AssertionError, match=r"token of .*: 40[01] "):
            keycloak.request_token(realm, **form)
        (found,) = keycloak.admin("GET", f"/{realm}/users", username=username, exact="true")
        return not found["enabled"]

    wait_until(locked_out, 30, what=f"lockout of {username}")
    with pytest.raises(AssertionError, match=r"token of .*: 40[01] "):
        keycloak.request_token(realm, **{**form, "password": PASSWORD})


def test_user_locked_out_by_wrong_passwords_receives_mail_and_may_not_send(real_keycloak, lockout_realm, make_daemon):
    daemon = make_daemon(keycloak=block(real_keycloak, lockout_realm), policy=SHORT).start()
    known = ("known", "dismissed", "free")
    assert ask(daemon, *known) == ask_senders(daemon, *known) == ["DUNNO"] * 3
    for username in ("known", "unknown"):
        lock_out(real_keycloak, lockout_realm, username)
    real_keycloak.change_user(lockout_realm, "dismissed", enabled=False)
    wait_until(lambda: ask_senders(daemon, "known", "unknown", "dismissed") == [NOT_OWNED] * 3, what="end of the right to send")
    wait_until(lambda: ask(daemon, "dismissed") == [REJECT], what="end of the mail of who is disabled for good")
    assert ask(daemon, "known", "unknown", "free") == ["DUNNO"] * 3
    assert ask_senders(daemon, "known", "unknown", "free") == [NOT_OWNED, NOT_OWNED, "DUNNO"]
    assert daemon.ask(**{**own("known"), "sasl_username": address("known")}) == NOT_OWNED
