"""mailcloakctl doctor: each mistake, made on purpose, is found by its name with its remedy; a good installation has no finding."""

from __future__ import annotations

import argparse
import base64
import contextlib
import grp
import imaplib
import json
import os
import pwd
import re
import shlex
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import MODULES, ROOT, USERS, Terminal, as_nobody, run_ctl, wait_until
from conftest import running as running_server
from keycloak_stand_in import CLIENT_SECRET, KeycloakStandIn
from real.dovecot import MAIL_GROUP, MAIL_USER, PrivateDovecot, make_certificate
from real.dovecot24 import PrivateDovecot24, UserinfoStandIn, installed_version
from real.keycloak import service_client
from real.keycloak import user as real_user
from real.postfix import PrivatePostfix, daemon_behind
from test_ask import FakeDaemon
from test_status import STATS

import mailcloak
import mailcloakask
import mailcloakcommon
import mailcloakctl
import mailcloakdoctor
import mailcloakdovecot
import mailcloakfindings
import mailcloakpostfix

ROLE_ALIASES = {f"{name}@{domain}": "alice" for name in ("postmaster", "abuse") for domain in ("d1.test", "d2.test")}


class Realm(KeycloakStandIn):
    """The stand-in with what doctor asks besides: pages of users, user federations, tokens that name roles and their time."""

    def __init__(self):
        super().__init__()
        self.components = None  # None: may not be read
        self.honours_first = True
        self.token_roles = ["view-users", "query-users", "query-groups"]  # None: a token that cannot be read
        self.ahead_seconds, self.tells_time = 0, True
        self.claims = ""  # what a token says, in place of all that
        original = self._server.RequestHandlerClass

        class Handler(original):
            def _get(self):
                path, _, query = self.path.partition("?")
                if path != f"/admin/realms/{self.keycloak.realm}/components":
                    super()._get()
                elif self.keycloak.components is None:
                    self._send(403, {"error": "HTTP 403 Forbidden"})
                else:
                    assert query == "type=org.keycloak.storage.UserStorageProvider"
                    self._send(200, self.keycloak.components)

        self._server.RequestHandlerClass = Handler

    def search(self, query):
        if "first" not in query or not self.honours_first:
            return super().search(query)
        return super().search({**query, "max": str(int(query["first"]) + int(query["max"]))})[int(query["first"]) :]

    def issue_token(self):
        token = super().issue_token()
        if self.token_roles is None:
            return token
        claims = {"resource_access": {"realm-management": {"roles": self.token_roles}}}
        if self.tells_time:
            claims["iat"] = int(time.time() + self.ahead_seconds)
        text = self.claims or json.dumps(claims)
        readable = f"e30.{base64.urlsafe_b64encode(text.encode()).decode().rstrip('=')}.{token}"
        with self._lock:
            self._tokens[readable] = self._tokens.pop(token)
        return readable


@pytest.fixture
def realm():
    """A realm with alice, bob and carol."""
    with Realm() as realm:
        for username, email in USERS.items():
            realm.add_user(username, email)
        yield realm


class Site:
    """A configuration and a database, and the findings of the checks that are named, after that of the configuration."""

    def __init__(self, directory, config):
        self.config_path = directory / "config.yaml"
        self.config = config
        self.database = Path(config["sqlite"]["path"])
        assert mailcloak.prepare_database(str(self.database), 5)
        for address, username in ROLE_ALIASES.items():
            self.insert("aliases", alias_email=address, username=username)

    def execute(self, statement, *parameters):
        with contextlib.closing(sqlite3.connect(self.database)) as database, database:
            return database.execute(statement, parameters).fetchall()

    def insert(self, table, **columns):
        marks = ", ".join("?" * len(columns))
        self.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", *columns.values())

    def write_config(self):
        self.config_path.write_text(yaml.safe_dump(self.config))
        self.config_path.chmod(0o600)

    def findings(self, *checks, write=True, **options):
        if write:
            self.write_config()
        return run_checks(self.config_path, *checks, **options)


def run_checks(config_path, *checks, **options):
    names = {"config": str(config_path), "db": None, "json": True, "postfix_config": None, "dovecot_config": None}
    host = mailcloakfindings.Installation(argparse.Namespace(**{**names, **options}))
    return [finding for check in (mailcloakdoctor.check_config, *checks) for finding in mailcloakdoctor.run_check(check, host)]


def the_only(findings, state, check):
    """The one finding of that name, and nothing else with a remedy: what others are skipped for is what this one says."""
    wrong = [finding for finding in findings if finding.remedy]
    assert [(finding.state, finding.check) for finding in wrong] == [(state, check)], wrong
    assert all(finding.state in ("ok", "skipped") for finding in findings if not finding.remedy)
    return wrong[0]


def the_only_skipped(findings, check, why):
    """One check was skipped for that reason, and there is nothing to do about it; all else is good."""
    (found,) = [finding for finding in findings if finding.state != "ok"]
    assert (found.state, found.check, found.remedy) == ("skipped", check, "")
    assert why in found.text


def nothing(findings):
    """Nothing but good findings."""
    assert findings
    assert all(finding.state == "ok" and not finding.remedy for finding in findings), findings


def named(findings, check):
    found = [finding for finding in findings if finding.check == check]
    assert found, findings
    return found


@pytest.fixture
def site(short_dir, make_config):
    """A sound site on static_users: alice, bob, carol."""
    return Site(short_dir, make_config(static_users=USERS))


@pytest.fixture
def keycloak_site(short_dir, make_config, realm):
    """A sound site on the stand-in."""
    return Site(short_dir, make_config(keycloak=realm.config()))


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(mailcloakcommon, "ANSWER_SECONDS", 5.0)


# ---- the configuration


def test_good_configuration_has_no_finding(site):
    nothing(site.findings(mailcloakdoctor.check_config_files))


def test_bad_configuration_is_a_problem_for_each_of_its_lines(site):
    site.config["policy"]["recipient_delimeter"] = "+"
    site.config["policy"]["cache_ttl_seconds"] = -1
    first, second = site.findings()
    assert {first.check, second.check} == {"config"}
    assert "policy.cache_ttl_seconds: expected a positive number, got -1" in first.text + second.text
    assert "unknown key; did you mean 'recipient_delimiter'?" in first.text + second.text
    assert first.remedy == "fix it; mailcloak --check-config says when it is good"


def test_good_blocks_of_a_bad_configuration_serve_the_other_checks(site):
    site.config["policy"]["domain"] = 7
    found = site.findings(mailcloakdoctor.check_database, mailcloakdoctor.check_daemon, mailcloakpostfix.check_postfix)
    assert named(found, "database")[0].text == f"{site.database} has 4 aliases and 0 apps"
    assert "there is no socket at" in named(found, "daemon")[0].text
    assert named(found, "postfix")[0].state == "skipped"


def test_domain_in_which_no_user_has_an_e_mail_is_a_problem(keycloak_site):
    keycloak_site.config["policy"]["domain"] = ["elsewhere.test"]
    keycloak_site.execute("DELETE FROM aliases")
    checks = (mailcloakdoctor.check_database, mailcloakdoctor.check_keycloak, mailcloakdoctor.check_users)
    found = the_only(keycloak_site.findings(*checks), "problem", "users")
    assert "typing error in policy.domain" in found.remedy


def test_next_step_is_a_remedy_and_not_a_hint_at_another_finding(capsys):
    vague = mailcloakfindings.problem("daemon-keycloak", "away", f"{mailcloakfindings.SEE_FINDINGS} about Keycloak")
    mailcloakdoctor.print_summary([vague, mailcloakfindings.problem("keycloak-token", "refused", "fix the secret")])
    mailcloakdoctor.print_summary([vague])
    shown = capsys.readouterr().out
    assert "next           keycloak-token: fix the secret; then" in shown
    assert "next           daemon-keycloak: look at the findings about Keycloak; then" in shown


def test_configuration_that_is_missing_is_a_problem(tmp_path):
    found = run_checks(tmp_path / "absent.yaml", *mailcloakdoctor.CHECKS[1:])
    assert "cannot be read: No such file or directory" in named(found, "config")[0].text
    assert named(found, "config")[0].remedy.startswith("make it of config.yaml.sample")
    assert not named(found, "postfix")[0].text.startswith("the check")
    assert all(finding.check != "doctor" for finding in found), found
    assert mailcloak.DEFAULT_DATABASE_PATH not in str(found), "nobody has configured it"
    (database,) = named(found, "database")
    assert (database.state, database.remedy) == ("skipped", mailcloakfindings.FIX_CONFIG)


@pytest.mark.real("root")
def test_configuration_that_this_user_may_not_read_asks_for_root(site):
    site.write_config()
    outcome = as_nobody(lambda: run_checks(site.config_path)[0])
    assert "state='skipped'" in outcome
    assert "Permission denied" in outcome
    assert mailcloakfindings.AS_ROOT in outcome


def skipped_checks(findings):
    return {finding.check: finding.text for finding in findings if finding.state == "skipped"}


def test_secret_is_not_said_to_be_safe_where_its_file_is_not_known(site):
    site.config["static_users"] = 7
    found = site.findings(mailcloakdoctor.check_config_files)
    assert "which file holds the client secret is not known" in skipped_checks(found)["config-mode"]
    assert ("ok", "config-mode") not in [(finding.state, finding.check) for finding in found]


def test_file_that_cannot_be_looked_at_is_not_said_to_be_safe(site):
    site.write_config()
    site.config_path.unlink()
    found = site.findings(mailcloakdoctor.check_config_files, write=False)
    assert ("ok", "config-mode") not in [(finding.state, finding.check) for finding in found]
    assert f"{site.config_path}: No such file or directory" in [finding.text for finding in named(found, "config-mode")]


def test_access_is_skipped_where_the_user_of_the_daemon_is_not_known(site):
    site.config["daemon"]["log_level"] = "loud"
    found = site.findings(mailcloakdoctor.check_config_files, mailcloakdoctor.check_database)
    assert {"config-access", "database-access"} <= set(skipped_checks(found))


def test_secret_that_every_user_can_read_is_a_problem(keycloak_site):
    keycloak_site.write_config()
    keycloak_site.config_path.chmod(0o644)
    found = the_only(keycloak_site.findings(mailcloakdoctor.check_config_files, write=False), "problem", "config-mode")
    assert found.remedy.startswith(f"chmod o-r {keycloak_site.config_path}")
    assert CLIENT_SECRET not in str(found)


def test_secret_file_that_every_user_can_read_is_a_problem(keycloak_site, short_dir):
    secret = short_dir / "secret"
    secret.write_text(CLIENT_SECRET)
    del keycloak_site.config["keycloak"]["client_secret"]
    keycloak_site.config["keycloak"]["client_secret_file"] = str(secret)
    assert (
        f"chmod o-r {secret}"
        in the_only(keycloak_site.findings(mailcloakdoctor.check_config_files), "problem", "config-mode").remedy
    )
    secret.chmod(0o600)
    nothing(keycloak_site.findings(mailcloakdoctor.check_config_files))


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_configuration_that_others_can_change_is_a_problem(site, mode):
    site.write_config()
    site.config_path.chmod(mode)
    found = the_only(site.findings(mailcloakdoctor.check_config_files, write=False), "problem", "config-mode")
    assert found.remedy == f"chmod go-w {site.config_path}"


@pytest.mark.parametrize("mode", [0o757, 0o775])
def test_configuration_that_others_can_replace_is_a_problem(site, mode):
    site.write_config()
    site.config_path.parent.chmod(mode)
    found = the_only(site.findings(mailcloakdoctor.check_config_files, write=False), "problem", "config-mode")
    assert found.remedy == f"chmod go-w {site.config_path.parent}"
    site.config_path.parent.chmod(0o1777)  # where nobody can replace what is another's
    nothing(site.findings(mailcloakdoctor.check_config_files, write=False))


@pytest.mark.real("root")
def test_configuration_of_another_user_is_a_problem(site):
    site.write_config()
    shutil.chown(site.config_path, "nobody")
    found = the_only(site.findings(mailcloakdoctor.check_config_files, write=False), "problem", "config-mode")
    assert "belongs to user nobody" in found.text
    assert found.remedy == f"chown root {site.config_path}"


@pytest.mark.real("root")
@pytest.mark.parametrize(
    ("owner", "group", "mode", "remedy"),
    [
        ("root", "root", 0o700, "chgrp nogroup {}; chmod g+x {}"),
        ("root", "nogroup", 0o700, "chmod g+x {}"),
        ("nobody", "root", 0o600, "chmod u+x {}"),
    ],
)
def test_directory_that_the_daemon_cannot_enter_is_a_warning_whose_remedy_helps(site, owner, group, mode, remedy):
    site.config["daemon"]["user"] = "nobody"
    folder = site.config_path.parent / "etc"
    folder.mkdir()
    site.config_path = folder / "config.yaml"
    site.write_config()
    site.config_path.chmod(0o644)
    shutil.chown(folder, owner, group)
    folder.chmod(mode)
    found = the_only(site.findings(mailcloakdoctor.check_config_files, write=False), "warning", "config-access")
    assert f"may not enter {folder}" in found.text
    assert found.remedy == remedy.replace("{}", str(folder))


@pytest.mark.real("root")
def test_configuration_that_a_reload_cannot_read_is_a_warning(site):
    site.config["daemon"]["user"] = "nobody"
    found = the_only(site.findings(mailcloakdoctor.check_config_files), "warning", "config-access")
    assert f"user nobody, which the daemon becomes, may not read {site.config_path}" in found.text
    assert found.remedy.startswith(f"chgrp {grp.getgrgid(pwd.getpwnam('nobody').pw_gid).gr_name} ")


@pytest.mark.real("root")
def test_access_of_the_daemon_is_not_checked_by_another_user(site):
    site.config["daemon"]["user"] = "daemon"
    site.write_config()
    site.config_path.chmod(0o644)
    site.database.chmod(0o644)

    def run():
        found = run_checks(site.config_path, mailcloakdoctor.check_config_files, mailcloakdoctor.check_database)
        return [(finding.state, finding.check, finding.remedy) for finding in found if finding.check.endswith("-access")]

    assert as_nobody(run) == str([("skipped", name, mailcloakfindings.AS_ROOT) for name in ("config-access", "database-access")])


def test_warnings_of_the_configuration_are_shown_with_their_remedy(keycloak_site):
    nothing(keycloak_site.findings())  # http to this very host
    keycloak_site.config["keycloak"]["base_url"] = "http://sso.example.org"
    found = the_only(keycloak_site.findings(), "warning", "config")
    assert found.text == "keycloak.base_url: http sends the client secret unencrypted"
    assert found.remedy == "use https beyond this host"


# ---- the database


def test_good_database_has_no_finding(site):
    nothing(site.findings(mailcloakdoctor.check_database))


def files(directory):
    """Every file with its content, mode and times."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns, path.stat().st_ino)
        for path in directory.iterdir()
        if path.is_file()
    }


@pytest.mark.parametrize("mode", ["DELETE", "WAL"])
def test_doctor_leaves_everything_as_it_was(site, mode):
    assert site.execute(f"PRAGMA journal_mode = {mode}") == [(mode.lower(),)]
    site.write_config()
    before = files(site.database.parent)
    assert "-wal" not in str(before.keys())
    found = run_checks(site.config_path, *mailcloakdoctor.CHECKS[1:])
    assert named(found, "database")[0].state == "ok"
    assert files(site.database.parent) == before


def test_wal_mode_is_a_warning(site):
    site.execute("PRAGMA journal_mode = WAL")
    found = the_only(site.findings(mailcloakdoctor.check_database), "warning", "database-journal")
    assert f"stop the daemon, then sqlite3 {site.database} 'PRAGMA journal_mode = DELETE'" in found.remedy
    assert "sqlite_readonly = yes" in found.remedy


def test_database_that_is_missing_is_a_problem_and_is_not_made(site):
    site.database.unlink()
    assert (
        "on a new host start the daemon, which makes it"
        in the_only(site.findings(mailcloakdoctor.check_database), "problem", "database").remedy
    )
    assert not site.database.exists()


def test_database_that_was_lost_is_to_be_restored_and_not_made_again(site):
    site.database.unlink()
    (site.database.parent / "last-known.db").touch()
    found = the_only(site.findings(mailcloakdoctor.check_database), "problem", "database")
    assert "restore it from a backup" in found.remedy
    assert "start" not in found.remedy.replace("restart", "")


def test_database_that_is_empty_is_to_be_restored(site):
    site.database.write_bytes(b"")
    found = the_only(site.findings(mailcloakdoctor.check_database), "problem", "database")
    assert (found.text, "restore it from a backup" in found.remedy) == (f"{site.database} is empty", True)


def test_database_that_strangers_may_replace_is_a_problem(site):
    site.database.parent.chmod(0o757)
    found = named(site.findings(mailcloakdoctor.check_database), "database-mode")  # root does not use it either
    assert f"chmod o-w {site.database.parent}" in [finding.remedy for finding in found]


def test_disk_without_room_is_a_problem(site, monkeypatch):
    monkeypatch.setattr(mailcloakdoctor, "NEEDED_BYTES", 2**62)
    assert the_only(site.findings(mailcloakdoctor.check_database), "problem", "database-room").remedy == "make room on it"


@pytest.mark.real("root")
def test_database_that_its_owner_may_not_write_is_a_problem(site):
    site.config["daemon"]["user"] = "nobody"
    site.config_path.parent.chmod(0o755)
    for path in (site.database, site.database.parent):
        shutil.chown(path, "nobody")
    site.database.chmod(0o440)
    assert (
        the_only(site.findings(mailcloakdoctor.check_database), "problem", "database-access").remedy == f"chmod u+w {site.database}"
    )


def test_file_that_is_no_database_is_a_problem(site):
    site.database.write_bytes(b"a letter to my aunt\n" * 100)
    found = the_only(site.findings(mailcloakdoctor.check_database), "problem", "database")
    assert "file is not a database" in found.text
    assert "restore this one from a backup" in found.remedy


def test_database_that_is_damaged_is_a_problem(site):
    for number in range(2000):
        site.insert("aliases", alias_email=f"{number}@d1.test", username="alice")
    content = bytearray(site.database.read_bytes())
    pages = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    leaves = [index for index, page in enumerate(pages) if page[0] == 10 and index]  # leaf pages of an index
    content[leaves[-1] * 4096 + 3 : leaves[-1] * 4096 + 5] = b"\x00\x01"  # says that it holds one row alone
    site.database.write_bytes(content)
    (found,) = named(site.findings(mailcloakdoctor.check_database), "database")  # and not ok besides
    assert (found.state, found.remedy) == ("problem", "restore it from a backup")


def test_database_that_was_not_read_holds_neither_aliases_nor_apps_that_are_good(site, monkeypatch):
    site.database.write_bytes(b"a letter to my aunt\n" * 100)
    checks = (mailcloakdoctor.check_role_addresses, mailcloakdoctor.check_aliases, mailcloakdoctor.check_apps)
    found = site.findings(mailcloakdoctor.check_database, *checks)
    assert skipped_checks(found) == dict.fromkeys(("postmaster", "abuse", "aliases", "apps"), "the database was not read")
    monkeypatch.setattr(mailcloakdovecot, "run_program", lambda *_: ("# Dovecot\n", ""))  # one without a passdb
    found = site.findings(mailcloakdoctor.check_database, mailcloakdovecot.check_dovecot)
    assert "are there apps that would need one? the database was not read" in skipped_checks(found)["dovecot"]


@pytest.mark.long
def test_database_too_big_to_be_searched_for_damage_is_not_said_to_be_whole(site, monkeypatch):
    for number in range(3000):
        site.insert("aliases", alias_email=f"{number}@d1.test", username="alice")
    monkeypatch.setattr(mailcloakcommon, "ANSWER_SECONDS", 0.0)
    found = site.findings(mailcloakdoctor.check_database)
    assert "was not searched for damage to its end" in skipped_checks(found)["database"]


def test_checks_that_need_the_configuration_are_skipped_without_it(tmp_path):
    found = run_checks(tmp_path / "absent.yaml", *mailcloakdoctor.CHECKS[1:])
    assert {"daemon", "socket-policy", "socket-aliases", "postfix", "keycloak", "postmaster", "users"} <= set(skipped_checks(found))


def test_database_of_another_version(site):
    site.execute("PRAGMA user_version = 4711")
    found = the_only(site.findings(mailcloakdoctor.check_database), "problem", "database")
    assert "schema version 4711" in found.text
    assert "install the newer mailcloak again" in found.remedy
    site.execute("DROP TABLE apps")
    site.execute("CREATE TABLE apps (app_id TEXT PRIMARY KEY, secret_hash TEXT NOT NULL, enabled INTEGER NOT NULL DEFAULT 1)")
    site.execute("PRAGMA user_version = 1")
    site.execute("INSERT INTO apps (app_id, secret_hash) VALUES ('printer', 'x')")
    found = the_only(site.findings(mailcloakdoctor.check_database, mailcloakdoctor.check_apps), "warning", "database")
    assert "restart the daemon: it migrates the file" in found.remedy
    assert site.execute("PRAGMA user_version") == [(1,)]


def test_database_that_strangers_may_use(site):
    site.database.chmod(0o644)
    found = the_only(site.findings(mailcloakdoctor.check_database), "warning", "database-mode")
    assert found.remedy == f"chmod o-r {site.database}"
    site.database.chmod(0o646)
    assert the_only(site.findings(mailcloakdoctor.check_database), "problem", "database-mode").remedy.startswith("chmod o-rwx ")


@pytest.mark.real("root")
def test_database_that_the_daemon_may_not_write_is_a_problem(site):
    site.config["daemon"]["user"] = "nobody"
    found = the_only(site.findings(mailcloakdoctor.check_database), "problem", "database-access")
    assert "may not read" in found.text
    site.database.chmod(0o640)
    shutil.chown(site.database, "nobody")
    found = the_only(site.findings(mailcloakdoctor.check_database), "problem", "database-access")
    assert f"may not write {site.database.parent}" in found.text
    shutil.chown(site.database.parent, "nobody")
    nothing(site.findings(mailcloakdoctor.check_database))


@pytest.mark.real("root")
def test_saved_users_that_belong_to_another_user_are_a_problem_until_the_remedy_was_carried_out(site):
    """Whatever their mode is: the daemon sets it."""
    site.config["daemon"]["user"] = "nobody"
    for path in (site.database, site.database.parent):
        shutil.chown(path, "nobody")
    nothing(site.findings(mailcloakdoctor.check_database))
    path = Path(mailcloak.last_known_path(str(site.database)))
    path.touch()
    path.chmod(0o666)
    found = the_only(site.findings(mailcloakdoctor.check_database), "problem", "database-access")
    assert carry_out(site, found.remedy)
    nothing(site.findings(mailcloakdoctor.check_database))


@pytest.mark.real("root")
def test_database_that_this_user_may_not_read_is_not_checked(site):
    site.write_config()
    site.config_path.chmod(0o644)
    outcome = as_nobody(lambda: run_checks(site.config_path, mailcloakdoctor.check_database)[1])
    assert "state='skipped'" in outcome
    assert mailcloakfindings.AS_ROOT in outcome


# ---- the commands of remedies are carried out, and help


def carry_out(site, remedy, **placeholders):
    """Run the commands of a remedy as a shell would, with these values in place of the words in capitals; what they were."""
    for word, value in placeholders.items():
        remedy = re.sub(rf"\b{word}\b", value, remedy)
    commands = re.findall(r"""sqlite3 \S+ (?:"[^"]*"|'[^']*')|(?:chmod|chown|chgrp|mailcloakctl) [^;,]*""", remedy)
    for command in commands:
        words = shlex.split(command)
        if words[0] == "mailcloakctl":
            run_ctl("--db", site.database, *words[1:])
        elif words[0] == "sqlite3":  # its command need not be installed
            site.execute(words[2])
        else:
            subprocess.run(words, check=True, timeout=30)
    return commands


def as_daemon(path, owner, group, mode):
    """Let nobody be the daemon's user, and give the path away."""

    def mistake(site):
        site.config["daemon"]["user"] = "nobody"
        target = path(site)
        shutil.chown(target, owner, group)
        target.chmod(mode)

    return mistake


MODES = {  # what is done, the check that finds it
    "secret for everybody": (lambda site: site.config_path.chmod(0o644), "config-mode"),
    "configuration for all to write": (lambda site: site.config_path.chmod(0o622), "config-mode"),
    "folder for all to write": (lambda site: site.config_path.parent.chmod(0o777), "config-mode"),
    "configuration of another": (lambda site: shutil.chown(site.config_path, "daemon"), "config-mode"),
    "configuration closed to the daemon": (as_daemon(lambda site: site.config_path, "root", "root", 0o600), "config-access"),
    "database for all to read": (lambda site: site.database.chmod(0o644), "database-mode"),
    "database for all to write": (lambda site: site.database.chmod(0o666), "database-mode"),
    "folder of the database for all to write": (lambda site: site.database.parent.chmod(0o757), "database-mode"),
    "database closed to the daemon": (as_daemon(lambda site: site.database, "root", "root", 0o640), "database-access"),
    "database that its owner may not write": (as_daemon(lambda site: site.database, "nobody", "root", 0o440), "database-access"),
    "database in WAL mode": (lambda site: site.execute("PRAGMA journal_mode = WAL"), "database-journal"),
}


@pytest.mark.real("root")
@pytest.mark.parametrize(("mistake", "check"), MODES.values(), ids=MODES)
def test_command_of_a_remedy_for_files_helps(keycloak_site, mistake, check):
    site = keycloak_site
    site.write_config()
    mistake(site)
    if site.config["daemon"]["user"]:
        site.config_path.parent.chmod(0o755)
        site.config_path.write_text(yaml.safe_dump(site.config))

    def found():
        checks = (mailcloakdoctor.check_config_files, mailcloakdoctor.check_database)
        return [finding for finding in site.findings(*checks, write=False) if finding.check == check and finding.remedy]

    assert found()
    for _ in range(3):  # a directory first, then what is in it
        for finding in found():
            assert carry_out(site, finding.remedy)
    assert not found()


# ---- the daemon and its sockets


@pytest.fixture
def running(site):
    """A daemon that answers, with statistics that the test changes: (findings, stats, fake)."""
    site.write_config()
    with FakeDaemon(site.config) as fake:
        for path in (site.config["sockets"]["policy_socket"], site.config["sockets"]["socketmap_socket"]):
            os.chmod(path, 0o660)
        stats = {
            **STATS,
            "version": mailcloak.__version__,
            "config": str(site.config_path),
            "started_at": time.time() + 5,
            "last_reload": None,
            "database": {"path": str(site.database), "works": True},
        }

        def findings(*checks):
            fake.maps["stats"] = f"OK {json.dumps(stats)}"
            return site.findings(*(checks or (mailcloakdoctor.check_daemon,)), write=False)

        yield findings, stats, fake


def test_good_daemon_has_no_finding(running):
    findings, _, _ = running
    nothing(findings(mailcloakdoctor.check_daemon, mailcloakdoctor.check_sockets))


def test_daemon_that_is_not_running_is_a_problem(site):
    found = site.findings(mailcloakdoctor.check_daemon, mailcloakdoctor.check_sockets)
    assert "there is no socket at" in named(found, "daemon")[0].text
    assert "rc-service mailcloak start" in named(found, "daemon")[0].remedy
    assert [finding.check for finding in found if finding.state == "problem"] == ["daemon", "socket-policy", "socket-aliases"]


def change(stats, **changes):
    stats.update(changes)


DAEMONS = {
    "older version": (lambda stats: change(stats, version="0.0.9"), "warning", "daemon", "restart the daemon"),
    "another configuration": (
        lambda stats: change(stats, config="/other.yaml"),
        "warning",
        "daemon-config",
        "name that file with --config",
    ),
    "refused reload": (
        lambda stats: change(stats, last_reload={"at": 1.0, "ok": False}),
        "problem",
        "daemon-config",
        "fix the configuration, and reload the daemon",
    ),
    "changed since": (lambda stats: change(stats, started_at=1.0), "warning", "daemon-config", "reload the daemon (rc-service"),
    "changed since a reload": (
        lambda stats: change(stats, started_at=1.0, last_reload={"at": 2.0, "ok": True}),
        "warning",
        "daemon-config",
        "reload the daemon (rc-service",
    ),
    "database": (
        lambda stats: change(stats, database={"path": stats["database"]["path"], "works": False}),
        "problem",
        "daemon-database",
        "look at the findings about the database",
    ),
    "another database": (
        lambda stats: change(stats, database={"path": "/other.db", "works": True}),
        "warning",
        "daemon-database",
        "restart it, so that it uses",
    ),
    "Keycloak": (
        lambda stats: change(stats, keycloak={**STATS["keycloak"], "state": "away", "failure": "timed out"}),
        "problem",
        "daemon-keycloak",
        "look at the findings about Keycloak",
    ),
}


@pytest.mark.parametrize(("mistake", "state", "check", "remedy"), DAEMONS.values(), ids=DAEMONS)
def test_daemon_that_is_not_well(running, mistake, state, check, remedy):
    findings, stats, _ = running
    mistake(stats)
    assert remedy in the_only(findings(), state, check).remedy


def test_database_that_a_restart_would_begin_anew_is_a_problem(running, site):
    findings, stats, _ = running
    change(stats, database={"path": "/other.db", "works": True})
    site.database.unlink()
    found = the_only(findings(), "problem", "daemon-database")
    assert "a restart begins an empty" in found.text
    assert found.remedy.startswith("to keep the database, stop the daemon, move the whole directory, and start the daemon")


def test_daemon_of_another_version_is_said_with_both_versions(running):
    findings, stats, _ = running
    stats.clear()
    stats.update({"version": "0.0.9", "pid": "in another form"})
    text = the_only(findings(), "warning", "daemon").text
    assert text == f"the running daemon is version 0.0.9, this is {mailcloak.__version__}"


def test_configuration_whose_time_cannot_be_seen_is_not_said_to_be_read(running, site, monkeypatch):
    findings, _, _ = running
    monkeypatch.setattr(
        mailcloakdoctor.os, "stat", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied", path))
    )
    (found,) = [each for each in findings() if each.check == "daemon-config"]
    assert (found.state, found.remedy) == ("skipped", mailcloakfindings.AS_ROOT)


def test_configuration_that_was_reloaded_after_its_change_is_no_finding(running):
    findings, stats, _ = running
    stats.update(started_at=1.0, last_reload={"at": time.time() + 5, "ok": True})
    nothing(findings())


def test_daemon_that_hangs_is_given_up(running, monkeypatch):
    findings, _, fake = running
    monkeypatch.setattr(mailcloakcommon, "ANSWER_SECONDS", 0.5)
    fake.policy = "hang"
    started = time.monotonic()
    found = findings(mailcloakdoctor.check_sockets)
    assert "no answer at" in the_only(found, "problem", "socket-policy").text
    assert time.monotonic() - started < 10


@pytest.mark.real("root")
def test_daemon_that_this_user_may_not_ask_is_skipped(running, site):
    findings, _, _ = running
    for path in (site.config_path, *list(site.config["sockets"].values())[:2]):
        os.chmod(path, 0o644 if path == site.config_path else 0o600)

    def run():
        found = findings(mailcloakdoctor.check_daemon, mailcloakdoctor.check_sockets)
        return [(finding.state, finding.check, finding.remedy) for finding in found if finding.state != "ok"]

    expected = [("skipped", name, mailcloakfindings.AS_ROOT) for name in ("daemon", "socket-policy", "socket-aliases")]
    assert as_nobody(run) == str(expected)
    site.config_path.parent.chmod(0o700)
    assert "Permission denied" in as_nobody(lambda: site.findings(mailcloakdoctor.check_sockets, write=False)[0].text)


def test_socket_whose_directory_is_missing_does_not_wait_for_the_daemon(site, tmp_path):
    site.config["sockets"]["policy_socket"] = str(tmp_path / "absent" / "policy")
    assert "its directory is missing" in named(site.findings(mailcloakdoctor.check_sockets), "socket-policy")[0].remedy


def test_finding_that_sends_to_the_log_says_where_it_is(running, site, tmp_path, monkeypatch):
    findings, stats, fake = running
    stats["database"] = {"path": str(site.database), "works": False}
    fake.policy = b""  # closes the connection
    settings = tmp_path / "conf.d"
    settings.write_text('# settings\nmailcloak_log="/srv/log/mailcloak"\n')
    by_systemd = "journalctl -u mailcloak" if os.path.isdir("/run/systemd/system") else ""
    for path, expected in ((tmp_path / "absent", "/var/log/mailcloak.log, or"), (settings, "/srv/log/mailcloak)")):
        monkeypatch.setattr(mailcloakask, "OPENRC_SETTINGS", str(path))
        assert (by_systemd or expected) in the_only(findings(), "problem", "daemon-database").remedy
        remedy = named(findings(mailcloakdoctor.check_sockets), "socket-policy")[0].remedy
        assert f"its log ({by_systemd or expected}" in remedy
    site.config["daemon"]["log"] = "syslog"
    site.write_config()
    assert "the host's log of mail" in named(findings(), "daemon-database")[0].remedy


def test_daemon_of_this_version_that_tells_nonsense_is_a_problem(running):
    findings, stats, _ = running
    stats["database"] = "fine"
    found = the_only(findings(), "problem", "daemon")
    assert "makes no sense" in found.text
    assert "something else listens there" in found.remedy


def test_socket_that_is_something_else_is_a_problem(site):
    path = Path(site.config["sockets"]["policy_socket"])
    path.write_text("")
    found = named(site.findings(mailcloakdoctor.check_sockets), "socket-policy")[0]
    assert (found.state, found.text) == ("problem", f"{path} is not a socket")


@pytest.mark.parametrize(("service", "check"), [("policy", "socket-policy"), ("socketmap", "socket-aliases")])
def test_socket_that_objects_to_nothing_asked_is_a_problem(running, service, check):
    findings, _, fake = running
    fake.policy = "OK" if service == "policy" else "DUNNO"
    fake.maps["alias"] = "OK x@y" if service == "socketmap" else "NOTFOUND "
    assert the_only(findings(mailcloakdoctor.check_sockets), "problem", check).remedy == "restart the daemon"


def test_socket_of_another_mode_than_configured_is_a_warning(running, site):
    findings, _, _ = running
    os.chmod(site.config["sockets"]["policy_socket"], 0o600)
    assert "restart the daemon" in the_only(findings(mailcloakdoctor.check_sockets), "warning", "socket-policy").remedy


@pytest.mark.real("root")
def test_socket_of_another_owner_than_configured_is_a_warning(running, site):
    findings, _, _ = running
    shutil.chown(site.config["sockets"]["socketmap_socket"], "nobody")
    assert the_only(findings(mailcloakdoctor.check_sockets), "warning", "socket-aliases")


# ---- Postfix, by the real postconf on a private instance


@contextlib.contextmanager
def listening(path):
    """A socket of Postfix's own user that takes connections."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(path))
        if os.geteuid() == 0:
            shutil.chown(path, "postfix", "postfix")
        listener.listen(4000)
        yield
    path.unlink()


@pytest.fixture(scope="module")
def instance():
    """Postfix on the sample settings, not started, and somebody who listens where Dovecot does."""
    postfix = PrivatePostfix(ports=["submission", "submissions"])
    postfix.certificate, postfix.key = make_certificate(postfix.config)
    with listening(postfix.private / "auth"), listening(postfix.private / "dovecot-lmtp"), listening(postfix.private / "rewrite"):
        yield postfix
    postfix.close()


def configure(instance):
    """The sample settings, and the certificate that is in a host's main.cf already."""
    instance.configure()
    instance.set(smtpd_tls_cert_file=instance.certificate, smtpd_tls_key_file=instance.key)


@pytest.fixture
def postfix(instance):
    """The instance, on the sample settings again."""
    configure(instance)
    return instance


@pytest.fixture
def mail_site(short_dir, make_config, postfix):
    """A site whose sockets are where the sample settings of Postfix look for them, served by a fake."""
    paths = {"policy_socket": str(postfix.private / "mailcloak"), "socketmap_socket": str(postfix.private / "mailcloak-socketmap")}
    site = Site(short_dir, make_config(static_users=USERS, sockets=paths))
    with FakeDaemon(site.config):
        for path in paths.values():
            if os.geteuid() == 0:
                shutil.chown(path, "postfix", "postfix")
            os.chmod(path, 0o660)
        yield site


@pytest.fixture
def ask_postfix(mail_site, postfix):
    def ask(**options):
        return mail_site.findings(mailcloakpostfix.check_postfix, **{"postfix_config": [str(postfix.config)], **options})

    return ask


ASK = "check_policy_service { unix:private/mailcloak, policy_context=%s }"
RECIPIENTS, SENDERS = "smtpd_recipient_restrictions", "smtpd_sender_restrictions"
SAMPLE_ACTION = "default_action = 451 4.3.0 Temporary lookup failure"
real_postfix = pytest.mark.real("postfix", "root")


@real_postfix
def test_sample_settings_of_postfix_have_no_finding(ask_postfix, postfix):
    found = ask_postfix()
    nothing(found)
    assert named(found, "postfix")[0].text == f"{postfix.config} has 4 smtpd services"
    assert [finding.text.partition("/inet ")[2] for finding in named(found, "postfix-smtpd")] == [
        "asks mailcloak about each recipient and each sender"
    ] * 4
    assert [finding.text for finding in named(found, "postfix-access")] == [
        f"user postfix can connect to {postfix.private / name} from its chroot"
        for name in ("mailcloak", "mailcloak-socketmap", "auth", "dovecot-lmtp")
    ]
    assert named(found, "postfix-domains")[0].text == "Postfix takes mail for d1.test, d2.test"
    (delivery,) = named(found, "postfix-delivery")
    assert delivery.text == "mail for d1.test, d2.test goes to lmtp:unix:private/dovecot-lmtp"
    (local,) = named(found, "postfix-sendmail")
    assert local.text == f"mail by sendmail(1) goes through 127.0.0.1:{postfix.ports['sendmail']}/inet, which asks mailcloak"


TO_DOVECOT = "main.cf: virtual_transport = lmtp:unix:private/dovecot-lmtp"
RELAY = "smtpd_relay_restrictions"
AS_LOCAL = {
    "virtual_mailbox_domains": "",
    "mydestination": "d1.test, d2.test",
    "mailbox_transport": "lmtp:unix:private/dovecot-lmtp",
}
MAIN_MISTAKES = {
    "permit_mynetworks before recipients": (
        {RECIPIENTS: f"permit_mynetworks, {ASK % 'recipient'}"},
        "problem",
        "postfix-permit",
        f"main.cf, {RECIPIENTS}: move check_policy_service before permit_mynetworks",
    ),
    "permit_sasl_authenticated before recipients": (
        {RECIPIENTS: f"reject_non_fqdn_recipient permit_sasl_authenticated {ASK % 'recipient'}"},
        "problem",
        "postfix-permit",
        "before permit_sasl_authenticated",
    ),
    "permit before senders": ({SENDERS: f"permit, {ASK % 'sender'}"}, "problem", "postfix-permit", f"main.cf, {SENDERS}: move"),
    "permit_mynetworks before senders": (
        {SENDERS: f"permit_mynetworks, {ASK % 'sender'}"},
        "warning",
        "postfix-permit",
        f"main.cf, {SENDERS}: move",
    ),
    "permit in a class": (
        {"smtpd_restriction_classes": "ours", "ours": "permit_mynetworks", RECIPIENTS: f"ours, {ASK % 'recipient'}"},
        "problem",
        "postfix-permit",
        "before permit_mynetworks",
    ),
    "recipients not asked": (
        {RECIPIENTS: "reject_non_fqdn_recipient"},
        "problem",
        "postfix-smtpd",
        f"main.cf: put {ASK % 'recipient'} into {RECIPIENTS}",
    ),
    "senders not asked": ({SENDERS: ""}, "problem", "postfix-smtpd", f"main.cf: put {ASK % 'sender'} into {SENDERS}"),
    "another policy service": (
        {RECIPIENTS: "check_policy_service unix:private/greylist"},
        "problem",
        "postfix-smtpd",
        f"into {RECIPIENTS}",
    ),
    "contexts exchanged": ({RECIPIENTS: ASK % "sender"}, "problem", "postfix-smtpd", f"into {RECIPIENTS}"),
    "at DATA": (
        {RECIPIENTS: "", "smtpd_data_restrictions": ASK % "recipient"},
        "problem",
        "postfix-smtpd",
        f"into {RECIPIENTS}",
    ),
    "too early": (
        {"smtpd_delay_reject": "no", RECIPIENTS: "", "smtpd_helo_restrictions": ASK % "recipient"},
        "problem",
        "postfix-smtpd",
        f"into {RECIPIENTS}",
    ),
    "absolute path in a chroot": (
        {RECIPIENTS: "check_policy_service unix:/QUEUE/private/mailcloak"},
        "problem",
        "postfix-smtpd",
        f"into {RECIPIENTS}",
    ),
    "context with a typing error": (
        {SENDERS: ASK % "sneder"},
        "problem",
        "postfix-smtpd",
        "policy_context=recipient or policy_context=sender",
    ),
    "trial": (
        {RECIPIENTS: f"warn_if_reject {ASK % 'recipient'}"},
        "warning",
        "postfix-trial",
        "take warn_if_reject out, then postfix reload",
    ),
    "permission by default": (
        {RECIPIENTS: "check_policy_service { unix:private/mailcloak, { default_action = DUNNO } }"},
        "problem",
        "postfix-default-action",
        SAMPLE_ACTION,
    ),
    "refusal by default": (
        {RECIPIENTS: "check_policy_service unix:private/mailcloak", "smtpd_policy_service_default_action": "550 5.3.0 Gone"},
        "problem",
        "postfix-default-action",
        SAMPLE_ACTION,
    ),
    "short timeout": (
        {RECIPIENTS: "check_policy_service { unix:private/mailcloak, timeout=1s }"},
        "warning",
        "postfix-timeout",
        "timeout=30s in check_policy_service",
    ),
    "no alias map": (
        {"virtual_alias_maps": "texthash:/etc/aliases"},
        "problem",
        "postfix-aliases",
        "virtual_alias_maps = socketmap:unix:private/mailcloak-socketmap:alias",
    ),
    "misspelled alias map": (
        {"virtual_alias_maps": "socketmap:unix:private/mailcloak-socketmap:aliases"},
        "problem",
        "postfix-aliases",
        "socketmap:unix:private/mailcloak-socketmap:alias",
    ),
    "alias map on the policy socket": (
        {"virtual_alias_maps": "socketmap:unix:private/mailcloak:alias"},
        "problem",
        "postfix-aliases",
        "socketmap:unix:private/mailcloak-socketmap:alias",
    ),
    "alias map by proxy": (
        {"virtual_alias_maps": "proxy:socketmap:unix:private/mailcloak-socketmap:alias"},
        "warning",
        "postfix-aliases",
        "virtual_alias_maps = socketmap:unix:",
    ),
    "domain missing": (
        {"virtual_mailbox_domains": "d1.test"},
        "problem",
        "postfix-domains",
        "main.cf: add d2.test to virtual_mailbox_domains",
    ),
    "domain twice": ({"mydestination": "d1.test"}, "problem", "postfix-domains", "leave it only in virtual_mailbox_domains"),
    "domain without mailboxes": (
        {"virtual_mailbox_domains": "d1.test", "virtual_alias_domains": "d2.test"},
        "problem",
        "postfix-domains",
        "move it to virtual_mailbox_domains",
    ),
    "domain that nobody checks": (
        {"virtual_mailbox_domains": "d1.test, d2.test, d3.test"},
        "warning",
        "postfix-domains",
        "add them to policy.domain, or take them out",
    ),
    "other delimiter": ({"recipient_delimiter": "-"}, "problem", "postfix-delimiter", 'policy.recipient_delimiter: "-"'),
    "no delimiter": ({"recipient_delimiter": ""}, "problem", "postfix-delimiter", 'policy.recipient_delimiter: ""'),
    "rewriting": ({"append_dot_mydomain": "yes"}, "warning", "postfix-rewriting", "main.cf: append_dot_mydomain = no"),
    "no transport": (
        {"virtual_transport": "", "virtual_mailbox_domains": "d1.test, d2.test"},
        "problem",
        "postfix-delivery",
        TO_DOVECOT,
    ),
    "transport that Postfix does not have": ({"virtual_transport": "dovecot"}, "problem", "postfix-delivery", TO_DOVECOT),
    "transport that throws away": ({"virtual_transport": "discard:"}, "problem", "postfix-delivery", TO_DOVECOT),
    "transport that refuses": ({"virtual_transport": "error:closed"}, "problem", "postfix-delivery", TO_DOVECOT),
    "virtual without mailboxes": ({"virtual_transport": "virtual"}, "problem", "postfix-delivery", TO_DOVECOT),
    "nobody at the transport": (
        {"virtual_transport": "lmtp:unix:private/nobody"},
        "problem",
        "postfix-access",
        f"with this socket as in {ROOT}/examples/dovecot-2.3",
    ),
    "accounts of the host": (
        {"virtual_mailbox_domains": "", "mydestination": "d1.test, d2.test"},
        "problem",
        "postfix-delivery",
        "main.cf: mailbox_transport = lmtp:unix:private/dovecot-lmtp",
    ),
    "recipients of the host": (
        {**AS_LOCAL, "local_recipient_maps": "proxy:unix:passwd.byname $alias_maps"},
        "problem",
        "postfix-recipients",
        "main.cf: leave local_recipient_maps empty",
    ),
    "recipients in a table": (
        {"virtual_mailbox_maps": "texthash:/etc/postfix/users"},
        "warning",
        "postfix-recipients",
        "main.cf: leave virtual_mailbox_maps empty",
    ),
    "open relay": ({RELAY: "permit"}, "problem", "postfix-relay", f"{RELAY} = permit_mynetworks, permit_sasl_authenticated, reject"),
    "open relay by the networks": ({"mynetworks": "0.0.0.0/0"}, "problem", "postfix-relay", "only hosts of yours"),
    "nothing ends relaying": ({RELAY: ""}, "problem", "postfix-relay", f"{RELAY} = permit_mynetworks"),
    "everything refused": ({"smtpd_client_restrictions": "reject"}, "problem", "postfix-relay", "take it out, then postfix reload"),
    "mail of other hosts refused": (
        {"smtpd_helo_restrictions": "permit_mynetworks, defer"},
        "warning",
        "postfix-relay",
        "compare the line smtp",
    ),
    "logins by Cyrus": ({"smtpd_sasl_type": "cyrus"}, "problem", "postfix-login", "main.cf: smtpd_sasl_type = dovecot"),
    "nobody to log in at": ({"smtpd_sasl_path": "private/nobody"}, "problem", "postfix-access", "smtpd_sasl_path = private/auth"),
    "no tokens": (
        {"smtpd_sasl_mechanism_filter": "plain, !xoauth2, login"},
        "problem",
        "postfix-login",
        "smtpd_sasl_mechanism_filter = !external, static:rest",
    ),
    "cron as one of ours": ({"myorigin": "D1.test"}, "warning", "postfix-sendmail", "main.cf: myorigin = $myhostname"),
    "typing error": (
        {"smtpd_recipient_restrictons": "reject"},
        "warning",
        "postfix-settings",
        "look for typing errors in these names",
    ),
}  # fmt: skip


@real_postfix
def test_setting_that_stands_twice_is_found_and_hides_nothing_else(ask_postfix, postfix):
    main = postfix.config / "main.cf"
    before = main.read_text()
    try:
        main.write_text(f"{before}\nrecipient_delimiter = -\nrecipient_delimiter = +\n")
        found = [finding for finding in ask_postfix() if finding.state != "ok"]
        assert [(finding.state, finding.check, finding.items) for finding in found] == [
            ("warning", "postfix-settings", ("recipient_delimiter",))
        ]
    finally:
        main.write_text(before)


def different(findings):
    """(state, check) and remedies of what is not ok, each once: there are three smtpd."""
    wrong = [finding for finding in findings if finding.state != "ok"]
    return {(finding.state, finding.check) for finding in wrong}, " ".join(finding.remedy for finding in wrong)


@real_postfix
@pytest.mark.parametrize(("settings", "state", "check", "remedy"), MAIN_MISTAKES.values(), ids=MAIN_MISTAKES)
def test_mistake_in_main_cf(ask_postfix, postfix, settings, state, check, remedy):
    settings = {name: value.replace("/QUEUE", str(postfix.queue_directory)) for name, value in settings.items()}
    postfix.set(**settings)
    found, remedies = different(ask_postfix())
    assert (state, check) in found
    assert found <= {(state, check), ("warning", "postfix-smtpd")}, "a mistake has one name; at DATA there is a warning besides"
    assert remedy in remedies


@real_postfix
@pytest.mark.parametrize("key", ["policy_socket", "socketmap_socket"])
def test_typing_error_in_the_path_of_a_socket_is_one_problem(ask_postfix, mail_site, key):
    """What main.cf says of the right one is looked at all the same; whether somebody listens is for other checks."""
    right = mail_site.config["sockets"][key]
    mail_site.config["sockets"][key] = wrong = right.replace("cloak", "claok")
    found = the_only(ask_postfix(), "problem", "postfix-sockets")
    assert found.text == f"sockets.{key}: {wrong} here, {right} in Postfix's main.cf; both must be the same"


@real_postfix
@pytest.mark.parametrize("name", [name for name, (*_, remedy) in MAIN_MISTAKES.items() if re.match(r"main\.cf: \w+ = ", remedy)])
def test_setting_that_a_remedy_names_helps(ask_postfix, postfix, name):
    postfix.set(**MAIN_MISTAKES[name][0])
    remedies = {finding.remedy for finding in ask_postfix() if finding.remedy}
    for remedy in remedies:
        settings = re.findall(r"(\w+) = (.+?)(?=, \w+ =|, then postfix reload$|, or another)", remedy.removeprefix("main.cf: "))
        assert settings, remedy
        postfix.set(**dict(settings))
    nothing(ask_postfix())


SOUND_SETTINGS = {
    "one service for both": {SENDERS: "", RECIPIENTS: "check_policy_service unix:private/mailcloak"},
    "in the relay list": {RECIPIENTS: "", "smtpd_relay_restrictions": f"{ASK % 'recipient'}, reject_unauth_destination"},
    "at MAIL": {"smtpd_delay_reject": "no"},
    "delayed helo list": {SENDERS: "", "smtpd_helo_restrictions": ASK % "sender"},
    "permit behind it": {RECIPIENTS: f"{ASK % 'recipient'} permit_mynetworks permit"},
    "permit in another list": {
        "smtpd_relay_restrictions": "permit_mynetworks, permit_sasl_authenticated, reject_unauth_destination"
    },
    "by a name of one's own": {
        "mailcloak_recipients": ASK % "recipient",
        RECIPIENTS: "reject_non_fqdn_recipient $mailcloak_recipients",
    },
    "in a class of a class": {
        "smtpd_restriction_classes": "ours, theirs, none",
        "ours": "theirs",
        "theirs": f"none, {ASK % 'recipient'}",
        "none": "",
        RECIPIENTS: "ours, permit",
    },
    "in a class": {"smtpd_restriction_classes": "ours", "ours": ASK % "recipient", RECIPIENTS: "ours"},
    "alias map among others": {
        "virtual_alias_maps": "texthash:/etc/other, socketmap:unix:private/mailcloak-socketmap:alias",
    },
    "further domains in a table": {"virtual_mailbox_domains": "d1.test, d2.test, texthash:/etc/postfix/domains"},
    "domains of local": AS_LOCAL,
    "relaying ended in the list of recipients": {RELAY: "", RECIPIENTS: f"{ASK % 'recipient'}, reject_unauth_destination"},
    "mechanisms named": {"smtpd_sasl_mechanism_filter": "plain, XOAUTH2"},
    "unlisted recipients passed": {"virtual_mailbox_maps": "texthash:/x", "smtpd_reject_unlisted_recipient": "no"},
    "trusted hosts alone relay": {RELAY: "permit_mynetworks, reject_unauth_destination", "mynetworks": "10.0.0.0/8, 127.0.0.1"},
    "default action of all": {
        RECIPIENTS: "check_policy_service unix:private/mailcloak",
        "smtpd_policy_service_default_action": "defer_if_permit try later",
    },
}


@real_postfix
@pytest.mark.parametrize("settings", SOUND_SETTINGS.values(), ids=SOUND_SETTINGS)
def test_other_sound_settings_have_no_finding(ask_postfix, postfix, settings):
    postfix.set(**settings)
    nothing(ask_postfix())


@real_postfix
def test_domains_are_looked_for_in_tables_and_files(ask_postfix, postfix, tmp_path):
    table, listed = tmp_path / "table", tmp_path / "list"
    table.write_text("d2.test anything\n")
    listed.write_text("# ours\nD1.test\n")
    postfix.set(virtual_mailbox_domains=f"{listed}, texthash:{table}")
    nothing(ask_postfix())
    postfix.set(virtual_mailbox_domains=f"!d2.test, {listed}, proxy:texthash:{table}")
    assert the_only(ask_postfix(), "problem", "postfix-domains").text == "Postfix takes no mail for d2.test"
    postfix.set(virtual_mailbox_domains="d1.test, d2.test", virtual_alias_domains=f"texthash:{table}")
    found = the_only(ask_postfix(), "problem", "postfix-domains")
    assert found.text == "d2.test is in virtual_alias_domains and in virtual_mailbox_domains"
    table.unlink()
    the_only_skipped(
        ask_postfix(), "postfix-domains", "does Postfix take mail for d1.test, d2.test, and deliver it? postmap failed"
    )
    postfix.set(virtual_alias_domains=str(table))
    the_only_skipped(ask_postfix(), "postfix-domains", f"No such file or directory: '{table}'")


@real_postfix
def test_transport_of_a_single_domain_counts(ask_postfix, postfix, tmp_path):
    table = tmp_path / "transport"
    table.write_text("d2.test discard:\nd1.test :\n")
    postfix.set(transport_maps=f"texthash:{table}")
    found = the_only(ask_postfix(), "problem", "postfix-delivery")
    assert "= discard:: mail for d2.test is lost or waits: discard(8) throws it away" in found.text


@real_postfix
@pytest.mark.parametrize("pattern", ["d2.test", ".test", "*"])
def test_transport_of_each_pattern_that_fits_counts_until_the_remedy_was_carried_out(ask_postfix, postfix, tmp_path, pattern):
    """Source: TABLE SEARCH ORDER of transport(5)."""
    table = tmp_path / "transport"
    table.write_text(f"{pattern} discard:\nd1.test :\n")
    postfix.set(transport_maps=f"texthash:{table}")
    found = the_only(ask_postfix(), "problem", "postfix-delivery")
    assert found.text == "transport_maps = discard:: mail for d2.test is lost or waits: discard(8) throws it away"
    domain, transport = re.fullmatch(r"transport_maps: let (\S+) lead to (\S+), then postfix reload", found.remedy).groups()
    lines = {pattern: "discard:", "d1.test": ":", domain: transport}
    table.write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
    nothing(ask_postfix())


@real_postfix
@pytest.mark.parametrize(
    ("pattern", "is_lost"),
    [("/@d2\\.test$/", True), ("/^d2\\.test$/", False), ("/^\\*$/", False)],
    ids=["address", "domain", "star"],
)
def test_transport_of_a_regular_expression_is_that_of_whole_addresses(ask_postfix, postfix, tmp_path, pattern, is_lost):
    """Source: REGULAR EXPRESSION TABLES of transport(5)."""
    table = tmp_path / "transport"
    table.write_text(f"{pattern} discard:\n")
    postfix.set(transport_maps=f"regexp:{table}")
    found = ask_postfix()
    if is_lost:
        assert "mail for d2.test is lost or waits" in the_only(found, "problem", "postfix-delivery").text
    else:
        nothing(found)


def add_to_service(postfix, name, option):
    """Put an -o option behind the first line of a service in master.cf."""
    path = postfix.config / "master.cf"
    text, count = re.subn(
        rf"^(127\.0\.0\.1:{postfix.ports[name]} .*)$", rf"\1\n  -o {option}", path.read_text(), flags=re.MULTILINE
    )
    assert count == 1
    path.write_text(text)
    postfix._age_files()


@real_postfix
@pytest.mark.parametrize(
    ("option", "check", "remedy"),
    [
        (f"{RECIPIENTS}=permit_sasl_authenticated,reject", "postfix-smtpd", f"master.cf: take -o {RECIPIENTS} out of the lines of"),
        (f"{SENDERS}=", "postfix-smtpd", f"master.cf: take -o {SENDERS} out of the lines of"),
        (
            f"{{ {RECIPIENTS} = permit_sasl_authenticated, {ASK % 'recipient'} }}",
            "postfix-permit",
            f"master.cf, -o {RECIPIENTS} of",
        ),
    ],
    ids=["recipients", "senders", "permit"],
)
def test_mistake_in_master_cf_is_that_of_one_service(ask_postfix, postfix, option, check, remedy):
    add_to_service(postfix, "submission", option)
    found = the_only(ask_postfix(), "problem", check)
    assert found.text.startswith(f"127.0.0.1:{postfix.ports['submission']}/inet")
    assert remedy in found.remedy


def change_master(postfix, old, new):
    path = postfix.config / "master.cf"
    text, count = re.subn(old, new, path.read_text(), flags=re.MULTILINE)
    assert count, old
    path.write_text(text)
    postfix._age_files()


@real_postfix
def test_mail_of_this_host_that_meets_no_smtpd_is_a_warning_until_it_is_restricted(ask_postfix, postfix):
    change_master(postfix, "^  -o content_filter=smtp.*\n", "")
    found = the_only(ask_postfix(), "warning", "postfix-sendmail")
    assert "examples/postfix/master.cf" in found.remedy
    settings = found.remedy.partition("or main.cf: ")[2]
    assert settings == "authorized_submit_users = root"
    postfix.set(authorized_submit_users="root, www-data")
    found = ask_postfix()
    nothing(found)
    (found,) = named(found, "postfix-sendmail")
    assert found.text == "only root and www-data may use sendmail(1); mailcloak is not asked about their mail"
    postfix.set(authorized_submit_users="!www-data, static:all")
    the_only(ask_postfix(), "warning", "postfix-sendmail")
    change_master(postfix, "^pickup .*\n.*\n", "")
    nothing(ask_postfix())


@real_postfix
def test_mail_of_this_host_through_a_port_that_does_not_ask_is_a_warning(ask_postfix, postfix):
    change_master(postfix, "^  -o mynetworks=.*", f"  -o {RECIPIENTS}=permit_mynetworks,reject\n  -o {SENDERS}=")
    the_only(ask_postfix(), "warning", "postfix-sendmail")


@real_postfix
def test_aliases_that_are_replaced_before_the_check_are_a_problem(ask_postfix, postfix):
    change_master(postfix, "^  -o receive_override_options=.*\n", "")
    assert "no_address_mappings" in the_only(ask_postfix(), "problem", "postfix-sendmail").remedy


@real_postfix
def test_table_that_may_permit_before_mailcloak_is_said(ask_postfix, postfix):
    postfix.set(**{RECIPIENTS: f"check_client_access texthash:/x, {ASK % 'recipient'}"})
    found = ask_postfix()
    nothing(found)
    assert all(each.text.endswith(", where check_client_access before it permits none") for each in named(found, "postfix-smtpd"))
    assert named(found, "postfix-relay")[0].text.endswith(", if tables permit nothing else")


@real_postfix
def test_aliases_that_are_left_to_a_filter_that_is_not_there_are_a_problem(ask_postfix, postfix):
    add_to_service(postfix, "submission", "receive_override_options=no_address_mappings")
    assert "take no_address_mappings out" in the_only(ask_postfix(), "problem", "postfix-aliases").remedy
    add_to_service(postfix, "submission", "content_filter=scan:[127.0.0.1]:10025")
    found = the_only(ask_postfix(), "problem", "postfix-delivery")
    assert found.remedy == "add it to master.cf, or name another; then postfix reload"
    change_master(postfix, r"\Z", "scan unix - - n - 10 smtp\n")
    nothing(ask_postfix())


@real_postfix
def test_host_without_a_port_for_logins_is_a_warning(ask_postfix, postfix):
    change_master(postfix, "^  -o smtpd_sasl_auth_enable=yes", "  -o smtpd_sasl_auth_enable=no")
    assert "examples/postfix/master.cf" in the_only(ask_postfix(), "warning", "postfix-login").remedy


@real_postfix
def test_settings_of_the_service_itself_count_where_it_delivers(ask_postfix, postfix):
    """local(8) and trivial-rewrite(8) read their own -o options."""
    postfix.set(**{**AS_LOCAL, "mailbox_transport": ""})
    the_only(ask_postfix(), "problem", "postfix-delivery")
    change_master(postfix, "^(local unix .*)", r"\1\n  -o mailbox_transport=lmtp:unix:private/dovecot-lmtp")
    nothing(ask_postfix())
    change_master(postfix, "^(rewrite unix .*)", r"\1\n  -o local_transport=discard:")
    the_only(ask_postfix(), "problem", "postfix-delivery")


@real_postfix
@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "lmtp unix - - n - - lmtp",
            "virtual_transport = lmtp:unix:private/dovecot-lmtp: mail for d1.test, d2.test is lost or waits",
        ),
        ("smtp unix - - n - - smtp", "the mail waits that default_transport and content_filter of pickup/unix would send there"),
    ],
)
def test_client_that_master_cf_does_not_have_is_a_problem_until_the_line_of_the_remedy_is_there(ask_postfix, postfix, line, says):
    postfix.set(default_transport="smtp")
    change_master(postfix, f"^{line[:4]} unix .*\n", "")
    found = the_only(ask_postfix(), "problem", "postfix-delivery")
    assert says in found.text
    assert found.remedy == f"master.cf: add the line {line}, then postfix reload"
    change_master(postfix, r"\Z", f"{line}\n")
    nothing(ask_postfix())


@real_postfix
@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"virtual_transport": "lmtp:inet:127.0.0.1:24"}, "postfix-delivery"),
        ({"virtual_transport": "smtp:[mailstore.test]"}, "postfix-delivery"),
        ({"virtual_mailbox_domains": "", "relay_domains": "d1.test, d2.test", "relay_transport": "smtp"}, "postfix-delivery"),
        ({"smtpd_sasl_path": "inet:127.0.0.1:12345"}, "postfix-access"),
    ],
)
def test_what_is_reached_over_the_network_is_not_said_to_be_there(ask_postfix, postfix, settings, check):
    postfix.set(**settings)
    skipped = [finding for finding in ask_postfix() if finding.state != "ok"]
    assert {(finding.state, finding.check, finding.remedy) for finding in skipped} == {("skipped", check, "")}
    assert all("Only Unix sockets are tried" in finding.text for finding in skipped)


@real_postfix
def test_mailboxes_of_virtual_are_not_said_to_be_there(ask_postfix, postfix):
    postfix.set(virtual_transport="virtual", virtual_mailbox_maps="texthash:/etc/postfix/users")
    the_only_skipped(ask_postfix(), "postfix-delivery", "has texthash:/etc/postfix/users a mailbox for each user?")


@real_postfix
def test_re_entry_port_of_a_filter_need_not_ask(ask_postfix, postfix):
    with open(postfix.config / "master.cf", "a") as master:
        master.write(f"localhost:10026 inet n - n - 10 smtpd\n  -o content_filter=\n  -o {RECIPIENTS}=permit_mynetworks,reject\n")
        master.write(f"  -o {SENDERS}=\n")
    found = ask_postfix()
    nothing(found)
    assert "localhost:10026/inet does not ask mailcloak, as a filter's re-entry port may" in [finding.text for finding in found]
    path = postfix.config / "master.cf"
    path.write_text(path.read_text().replace("localhost:10026", "10026"))
    assert ("problem", "postfix-smtpd") in different(ask_postfix())[0]


@real_postfix
def test_cleanup_without_the_alias_map_is_a_problem(ask_postfix, postfix):
    path = postfix.config / "master.cf"
    path.write_text(re.sub(r"^(cleanup .*)$", r"\1\n  -o virtual_alias_maps=", path.read_text(), flags=re.MULTILINE))
    assert the_only(ask_postfix(), "problem", "postfix-aliases").text.startswith("master.cf, cleanup/unix: ")


@real_postfix
def test_socket_that_postfix_may_not_use_is_a_problem(ask_postfix, mail_site):
    path = mail_site.config["sockets"]["policy_socket"]
    os.chmod(path, 0o600)
    shutil.chown(path, "root")
    found = the_only(ask_postfix(), "problem", "postfix-access")
    assert found.text == f"user postfix cannot connect to {path}: permission denied"
    assert found.remedy.startswith("sockets.socket_owner_user: postfix")


@real_postfix
@pytest.mark.parametrize("left", [False, True], ids=["no socket", "socket of a killed daemon"])
def test_daemon_that_is_stopped_is_no_fault_of_its_owner(short_dir, make_config, postfix, left):
    paths = {"policy_socket": str(postfix.private / "mailcloak"), "socketmap_socket": str(postfix.private / "mailcloak-socketmap")}
    site = Site(short_dir, make_config(static_users=USERS, sockets=paths))
    with contextlib.ExitStack() as stack:
        for path in map(Path, paths.values() if left else ()):
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
                dead.bind(str(path))
            shutil.chown(path, "postfix", "postfix")
            stack.callback(path.unlink)
        found = named(site.findings(mailcloakpostfix.check_postfix, postfix_config=[str(postfix.config)]), "postfix-access")
    remedy = "look at the findings about the daemon and its sockets"
    assert [(each.state, each.remedy) for each in found] == [("problem", remedy)] * 2 + [("ok", "")] * 2


@real_postfix
def test_socket_outside_the_queue_directory_is_a_problem_for_a_chroot_alone(site, postfix):
    with FakeDaemon(site.config):
        for path in list(site.config["sockets"].values())[:2]:
            os.chmod(path, 0o666)
        policy, socketmap = site.config["sockets"]["policy_socket"], site.config["sockets"]["socketmap_socket"]
        postfix.set(
            virtual_alias_maps=f"socketmap:unix:{socketmap}:alias",
            **{SENDERS: "", RECIPIENTS: f"check_policy_service unix:{policy}"},
        )
        ask = {"postfix_config": [str(postfix.config)]}
        found = [each for each in site.findings(mailcloakpostfix.check_postfix, **ask) if each.check == "postfix-access"]
        assert [each.state for each in found] == ["problem", "problem", "ok", "ok"]
        assert f"sockets: put both below {postfix.queue_directory}/private" in found[0].remedy
        postfix._run("postconf", "-F", "*/*/chroot=n")
        nothing(site.findings(mailcloakpostfix.check_postfix, **ask))


@real_postfix
@pytest.mark.parametrize(("level", "is_confined"), [("0", True), ("1", False), ("3.6", False)])
def test_chroot_that_master_cf_leaves_open_is_one_below_compatibility_level_1(site, postfix, level, is_confined):
    """Source: COMPATIBILITY_README of Postfix, chroot=y."""
    postfix._run("postconf", "-F", "*/*/chroot=-")
    postfix.set(compatibility_level=level)
    with FakeDaemon(site.config):
        for path in list(site.config["sockets"].values())[:2]:
            os.chmod(path, 0o666)
        found = named(site.findings(mailcloakpostfix.check_postfix, postfix_config=[str(postfix.config)]), "postfix-access")
    assert ["where 127.0.0.1:" in each.text for each in found] == [is_confined, is_confined, False, False], found


@real_postfix
def test_each_instance_that_is_named_is_checked(ask_postfix, postfix, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(postfix.config, other)
    settings = re.sub("(?m)^recipient_delimiter .*\n", "", (other / "main.cf").read_text())
    (other / "main.cf").write_text(settings + "recipient_delimiter = -\n")
    found = ask_postfix(postfix_config=[str(postfix.config), str(other)])
    assert len(named(found, "postfix")) == 2
    assert the_only(found, "problem", "postfix-delimiter")


@real_postfix
def test_mailbox_domain_must_be_taken_by_postfix(ask_postfix, mail_site):
    mail_site.config["policy"]["mailbox_domain"] = "mailbox.internal"
    found = the_only(ask_postfix(), "problem", "postfix-domains")
    assert found.text == "Postfix takes no mail for mailbox.internal"


@real_postfix
def test_who_is_not_root_is_told_what_was_not_checked(mail_site, postfix):
    mail_site.write_config()
    mail_site.config_path.chmod(0o644)

    def run():
        found = run_checks(mail_site.config_path, mailcloakpostfix.check_postfix, postfix_config=[str(postfix.config)])
        return sorted((finding.state, finding.check, finding.remedy) for finding in found if finding.state != "ok")

    names = ["postfix-access"] * 4 + ["postfix-certificate", "postfix-running"]
    assert as_nobody(run) == str([("skipped", name, mailcloakfindings.AS_ROOT) for name in names])


@pytest.mark.real("postfix")
def test_folder_that_is_no_configuration_of_postfix_is_a_problem(site, tmp_path):
    found = the_only(site.findings(mailcloakpostfix.check_postfix, postfix_config=[str(tmp_path)]), "problem", "postfix")
    assert found.text.startswith("not checked: postconf failed: ")
    assert "fix main.cf" in found.remedy
    assert "--postfix-config" in found.remedy


def test_host_without_postfix_is_skipped_with_a_remedy_and_one_without_dovecot_is_none(site, monkeypatch, tmp_path):
    monkeypatch.setattr(mailcloakfindings, "SYSTEM_PATH", str(tmp_path))
    found = the_only(site.findings(mailcloakpostfix.check_postfix), "skipped", "postfix")
    assert found.text == "there is no postconf in the PATH"
    the_only_skipped(site.findings(mailcloakdovecot.check_dovecot), "dovecot", "there is no doveconf in the PATH")


@pytest.mark.parametrize(
    ("check", "program", "name"),
    [(mailcloakpostfix.check_postfix, "postconf", "postfix"), (mailcloakdovecot.check_dovecot, "doveconf", "dovecot")],
    ids=["postfix", "dovecot"],
)
def test_program_that_says_nothing_is_not_taken_for_one_that_is_content(site, monkeypatch, tmp_path, check, program, name):
    for each in ("postconf", "doveconf"):
        (tmp_path / each).write_text("#!/bin/sh\n")
        (tmp_path / each).chmod(0o755)
    monkeypatch.setattr(mailcloakfindings, "SYSTEM_PATH", f"{tmp_path}:/bin:/usr/bin")
    assert the_only(site.findings(check), "skipped", name).text == f"{program} says nothing"


def test_program_that_hangs_is_given_up(site, monkeypatch, tmp_path):
    program = tmp_path / "postconf"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(mailcloakfindings, "SYSTEM_PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(mailcloakcommon, "ANSWER_SECONDS", 0.5)
    found = the_only(site.findings(mailcloakpostfix.check_postfix), "skipped", "postfix")
    assert "postconf gave no answer within" in found.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" a,b  c,,d ", ["a", "b", "c", "d"]),
        ("a { b, c { d e } } f", ["a", "{ b, c { d e } }", "f"]),
        ("a{b c}d", ["a{b c}d"]),
    ],
)
def test_list_of_postfix_is_split_outside_braces(text, words):
    assert mailcloakfindings.split_list(text) == words


@pytest.mark.parametrize(
    ("text", "endpoint", "options"),
    [
        ("unix:private/x", "unix:private/x", {}),
        ("{ unix:x, timeout=30s }", "unix:x", {"timeout": "30s"}),
        (
            "{unix:x {default_action = 451 4.3.0 a b}, policy_context=sender}",
            "unix:x",
            {"default_action": "451 4.3.0 a b", "policy_context": "sender"},
        ),
        ("{}", "", {}),
        ("", "", {}),
    ],
)
def test_policy_service_of_postfix_is_understood(text, endpoint, options):
    assert mailcloakpostfix.read_policy_service(text) == (endpoint, options)


# ---- Dovecot


def sample_query_23():
    text = (ROOT / "examples" / "dovecot-2.3" / "dovecot-sql.conf.ext").read_text(encoding="utf-8")
    return mailcloakdovecot.PasswordQuery("sample", mailcloakdovecot.read_settings(text)["password_query"], "", True)


def sample_query_24():
    text = (ROOT / "examples" / "dovecot-2.4" / "dovecot.conf").read_text(encoding="utf-8")
    lines = re.search(r"^passdb sql \{\n.*?^\}\n", text, re.MULTILINE | re.DOTALL)[0]
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in lines.splitlines() if not line.strip().startswith("#")))
    (found,) = mailcloakdovecot.find_password_queries(f"sql_driver = sqlite\nsqlite_path = /x.db\n{joined}\n")
    assert (found.place, found.database, found.percent_doubled) == ("passdb sql", "/x.db", False)
    return found


SAMPLE_QUERIES = {"2.3": sample_query_23, "2.4": sample_query_24}


@pytest.mark.parametrize("sample", SAMPLE_QUERIES.values(), ids=SAMPLE_QUERIES)
def test_query_of_the_sample_has_no_finding(sample):
    nothing(list(mailcloakdovecot.check_query(sample())))


QUERY_MISTAKES = {
    "disabled apps": (r" AND enabled = 1", "", "lets disabled apps log in"),
    "expired apps": (r"AND \(expires_at IS NULL.*$", "", "lets expired apps log in"),
    "other services": (r"AND '%\S+ IN \('smtp', 'submission'\)", "", "lets apps log in to read mail"),
    "no service": (
        r"'smtp', 'submission'",
        "'imap'",
        "does not give the hash of an app that sends and lets apps log in to read mail",
    ),
    "anybody": (r"app_id = '[^']*'", "1 = 1", "lets anybody log in"),
    "no hash": (r"secret_hash AS password", "'x' AS password", "does not give the hash"),
    "misspelled column": (r"secret_hash", "secret", "its query fails: no such column: secret"),
    "misspelled SQL": (r"SELECT", "SELCT", "its query fails: near"),
}


@pytest.mark.parametrize("sample", SAMPLE_QUERIES.values(), ids=SAMPLE_QUERIES)
@pytest.mark.parametrize(("old", "new", "says"), QUERY_MISTAKES.values(), ids=QUERY_MISTAKES)
def test_mistake_in_the_query_is_a_problem(sample, old, new, says):
    query = re.sub(old, new, sample().query)
    assert query != sample().query
    if says.startswith("does not give the hash") and "x" in new:
        query = query.replace("app_id AS user", "'u' AS user")
    found = the_only(list(mailcloakdovecot.check_query(sample()._replace(query=query))), "problem", "dovecot-query")
    assert says in found.text
    assert "examples/dovecot-2.3/dovecot-sql.conf.ext" in found.remedy


@pytest.mark.parametrize(("sample", "variable"), [(sample_query_23, "%r"), (sample_query_24, "%{remote_ip}")])
def test_query_with_a_variable_that_is_not_known_is_not_checked(sample, variable):
    query = sample().query + f" AND '{variable}' <> ''"
    found = the_only(list(mailcloakdovecot.check_query(sample()._replace(query=query))), "skipped", "dovecot-query")
    assert f"uses {variable}, which is not known here" in found.text


@pytest.mark.parametrize("variable", ["%u", "%Lu", "%n", "%{user}", "%{username}", "%L{user}"])
def test_names_of_the_login_in_a_query_of_dovecot_2_3(variable):
    query = mailcloakdovecot.PasswordQuery("", f"'{variable}' 100%%", "", True)
    assert mailcloakdovecot.fill_query(query, "bob", "smtp") == "'bob' 100%"


@pytest.fixture(scope="module")
def dovecot_factory():
    """Make a private Dovecot's configuration of the samples; nothing is started."""
    made = []

    def make(database, changes=()):
        kind = PrivateDovecot24 if installed_version() >= (2, 4) else PrivateDovecot
        made.append(kind("/nowhere", "http://127.0.0.1:1/realms/mail", database, changes))
        return made[-1]

    yield make
    for instance in made:
        instance.close()


real_dovecot = pytest.mark.real("dovecot", "root")


def ask_dovecot(site, instance, *usernames):
    """What is found where Keycloak has these users."""

    def know_users(host):
        host.users = {name: mailcloak.User(name, "", True) for name in usernames or USERS}
        return iter(())

    checks = (mailcloakdoctor.check_database, know_users, mailcloakdovecot.check_dovecot)
    return site.findings(*checks, dovecot_config=str(instance.config / "dovecot.conf"))


@pytest.fixture
def readable_site(site):
    """As in a real installation: the database belongs to a group of its own."""
    shutil.chown(site.database, group="daemon")
    return site


@real_dovecot
def test_sample_settings_of_dovecot_have_no_finding(readable_site, dovecot_factory):
    found = ask_dovecot(readable_site, dovecot_factory(readable_site.database))
    nothing(found)
    assert "Dovecot's auth-worker can read the database as user dovecot" in named(found, "dovecot-access")[0].text
    assert "apps log in to send, while they are enabled and not expired" in named(found, "dovecot-query")[0].text


@real_dovecot
def test_dovecot_on_another_database_is_a_problem(readable_site, dovecot_factory, short_dir):
    other = short_dir / "other.db"
    shutil.copy(readable_site.database, other)
    shutil.chown(other, group="daemon")
    found = the_only(ask_dovecot(readable_site, dovecot_factory(other)), "problem", "dovecot")
    assert f"reads {other}, not {readable_site.database}" in found.text
    assert "doveadm reload" in found.remedy


@real_dovecot
def test_dovecot_that_may_not_read_the_database_is_a_problem(readable_site, dovecot_factory):
    instance = dovecot_factory(readable_site.database)
    shutil.chown(readable_site.database, group="root")
    found = the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-access")
    assert f"runs as user dovecot, who may not read {readable_site.database}" in found.text
    assert "extra_groups = mailcloak" in found.remedy
    shutil.chown(readable_site.database, group="daemon")
    readable_site.database.chmod(0o600)
    found = the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-access")
    assert found.remedy == f"chmod g+r {readable_site.database}"


@real_dovecot
def test_group_of_dovecot_that_does_not_exist_is_a_problem(readable_site, dovecot_factory, monkeypatch):
    instance = dovecot_factory(readable_site.database)
    replace_in(instance.config, "extra_groups = daemon", "extra_groups = mailcloak-x")
    found = the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-access")
    assert found.text.startswith("Dovecot does not start: extra_groups of service auth-worker names mailcloak-x")
    assert found.remedy.startswith("name mailcloak there, the group of the database")
    monkeypatch.setattr(mailcloakfindings.Installation, "daemon_group", "mailcloak-x")
    found = the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-access")
    assert found.remedy.startswith("make it, with the daemon's user, by useradd --system --user-group mailcloak-x,")


@real_dovecot
def test_dovecot_is_not_compared_with_a_database_that_is_not_known(site, dovecot_factory):
    """But whether it can read its own is checked."""
    site.config["sqlite"] = {"path": 7}
    site.database.chmod(0o600)
    found = ask_dovecot(site, dovecot_factory(site.database))
    assert {finding.check for finding in found if finding.state == "problem"} == {"config", "dovecot-access"}
    assert f"may not read {site.database}" in named(found, "dovecot-access")[0].text


@real_dovecot
@pytest.mark.parametrize(
    ("mechanisms", "says"),
    [
        ("plain login", "no user can log in with a token"),
        ("xoauth2", "no app can log in"),
        ("plain xoauth2 cram-md5", "mailcloak believes logins by these too, whatever Dovecot checks for them: cram-md5"),
    ],
)
def test_mechanisms_of_dovecot_that_do_not_fit_are_a_warning(readable_site, dovecot_factory, mechanisms, says):
    readable_site.insert("apps", app_id="printer", secret_hash="x")
    change = ("auth_mechanisms = plain login oauthbearer xoauth2", f"auth_mechanisms = {mechanisms}")
    found = the_only(ask_dovecot(readable_site, dovecot_factory(readable_site.database, [change])), "warning", "dovecot-mechanisms")
    assert says in found.text
    assert found.remedy.startswith(change[0])


@real_dovecot
@pytest.mark.parametrize("limited", ["", "oauthbearer xoauth2"])
def test_passdb_by_which_others_than_apps_log_in_by_password_is_a_problem(readable_site, dovecot_factory, tmp_path, limited):
    """By any password of the host; one for tokens alone lets nobody in by password."""
    is_new = installed_version() >= (2, 4)
    users = tmp_path / "users"
    users.write_text("bob:{PLAIN}secret\n")
    place = f"passdb_driver = passwd-file\n  passwd_file_path = {users}" if is_new else f"driver = passwd-file\n  args = {users}"
    mechanisms = f"  {'mechanisms_filter' if is_new else 'mechanisms'} = {limited}\n" if limited else ""
    passdb = f"passdb{' other' if is_new else ''} {{\n  {place}\n{mechanisms}}}\n"
    change = "auth_mechanisms = plain login oauthbearer xoauth2\n"
    instance = dovecot_factory(readable_site.database, [(change, f"{change}{passdb}")])
    found = named(ask_dovecot(readable_site, instance), "dovecot-mechanisms")
    assert any("lets others than apps log in by password" in finding.text for finding in found) == (not limited), found


@real_dovecot
def test_login_that_is_remembered_or_cut_is_a_problem_until_the_remedy_was_carried_out(readable_site, dovecot_factory):
    instance = dovecot_factory(readable_site.database)
    path = instance.config / "dovecot.conf"
    sample = path.read_text()
    is_new = installed_version() >= (2, 4)
    for line, is_harmless in (
        ("auth_cache_size = 10M", False),
        ("auth_cache_size = 0", True),
        ("auth_username_format = " + ("%{user | username}" if is_new else "%Ln"), False),
        ("auth_username_format = %{user}@d1.test", False),
        ("auth_username_format = %{user}", True),
        ("auth_username_format = " + ("%{user | lower}" if is_new else "%u"), True),
    ):
        path.write_text(f"{sample}\n{line}\n")
        found = ask_dovecot(readable_site, instance)
        if is_harmless:
            nothing(found)
        else:
            found = the_only(found, "problem", "dovecot-logins")
            assert f"take {line.split()[0]} out" in found.remedy
            assert line.split()[0] in found.text


@real_dovecot
def test_dovecot_with_a_wrong_query_is_a_problem(readable_site, dovecot_factory):
    instance = dovecot_factory(readable_site.database, [("AND enabled = 1", "AND 1 = 1")])
    assert "lets disabled apps log in" in the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-query").text


@real_dovecot
def test_dovecot_without_the_database_matters_only_where_there_are_apps(site, tmp_path):
    first = "dovecot_config_version = 2.4.0\ndovecot_storage_version = 2.4.0\n" if installed_version() >= (2, 4) else ""
    path = tmp_path / "dovecot.conf"
    path.write_text(f"{first}ssl = no\nauth_mechanisms = plain oauthbearer\n")
    ask = (mailcloakdoctor.check_database, mailcloakdovecot.check_dovecot)
    nothing(site.findings(*ask, dovecot_config=str(path)))
    site.insert("apps", app_id="printer", secret_hash="x")
    assert "1 app cannot log in" in the_only(site.findings(*ask, dovecot_config=str(path)), "warning", "dovecot").text


def change_settings(instance, name, line):
    """Put a line for that of this setting, in all of Dovecot's files; "" takes it out."""
    for path in instance.config.glob("*.conf*"):
        path.write_text(re.sub(rf"^(\s*){name} = .*$", rf"\1{line}", path.read_text(), flags=re.MULTILINE))


def words_of(remedy, name):
    """NAME = VALUE of this version in a remedy that has the values of both."""
    values = {version: value for value, version in re.findall(r'"([^"]*)" in (2\.[34])', remedy)}
    return f"{name} = {values['2.4' if installed_version() >= (2, 4) else '2.3']}"


@real_dovecot
@pytest.mark.parametrize(
    ("first", "users", "way"), [("", ["alice"], "with"), ("", ["erin@d1.test"], ""), ("x", ["erin@d1.test"], "without")]
)
def test_mailbox_of_another_name_than_its_user_is_a_problem_until_the_remedy_was_carried_out(
    readable_site, dovecot_factory, first, users, way
):
    """Dovecot's default keeps the domain; the sample cuts it."""
    instance = dovecot_factory(readable_site.database)
    if not first:
        change_settings(instance, "auth_username_format", "")
    if not way:
        nothing(ask_dovecot(readable_site, instance, *users))
        return
    found = the_only(ask_dovecot(readable_site, instance, *users), "problem", "dovecot-names")
    assert found.text.endswith(f"named {way} the domain: {users[0]}")
    if not first:
        change_settings(instance, "recipient_delimiter", "recipient_delimiter = +\nprotocol lmtp {\n  auth_username_format = x\n}")
    change_settings(instance, "auth_username_format", words_of(found.remedy, "auth_username_format"))
    nothing(ask_dovecot(readable_site, instance, *users))


@real_dovecot
def test_other_delimiter_in_dovecot_is_a_problem_until_the_remedy_was_carried_out(readable_site, dovecot_factory):
    instance = dovecot_factory(readable_site.database)

    def ask():
        path = str(instance.config / "dovecot.conf")
        found = readable_site.findings(mailcloakdoctor.check_config, mailcloakdovecot.check_dovecot, dovecot_config=path)
        return next((each for each in found if each.check == "dovecot-delimiter"), None)

    readable_site.config["policy"]["recipient_delimiter"] = "+"
    assert ask().state == "ok"
    for theirs, ours, state, effect in (
        ("-", "+", "problem", "bounces"),
        ("+-", "+", "warning", "another"),
        ("+", "", "warning", "another"),
    ):
        readable_site.config["policy"]["recipient_delimiter"] = ours
        change_settings(instance, "recipient_delimiter", f"recipient_delimiter = {theirs}")
        found = ask()
        assert found.state == state
        assert found.text.startswith(f"recipient_delimiter is '{theirs}' in Dovecot")
        assert effect in found.text
        change_settings(instance, "recipient_delimiter", re.search("recipient_delimiter = [^,]?", found.remedy)[0])
        assert ask() is None if not ours else ask().state == "ok"
    readable_site.config["policy"] = 7
    assert ask().state == "skipped"


@real_dovecot
@real_postfix
def test_other_delimiter_in_mailcloak_alone_is_one_problem(mail_site, postfix, dovecot_factory):
    """Dovecot is to have what Postfix has, so no remedy contradicts another one."""
    mail_site.config["policy"]["recipient_delimiter"] = ""
    path = str(dovecot_factory(mail_site.database).config / "dovecot.conf")
    options = {"postfix_config": [str(postfix.config)], "dovecot_config": path}
    found = mail_site.findings(mailcloakpostfix.check_postfix, mailcloakdovecot.check_dovecot, **options)
    (problem,) = named(found, "postfix-delimiter")
    assert (problem.state, problem.remedy.partition(",")[0]) == ("problem", 'policy.recipient_delimiter: "+"')
    (good,) = named(found, "dovecot-delimiter")
    assert (good.state, good.text) == ("ok", "recipient_delimiter is '+' in Dovecot and in main.cf")


@real_dovecot
def test_format_of_names_that_is_not_known_is_not_said_to_be_right(readable_site, dovecot_factory):
    instance = dovecot_factory(readable_site.database)
    change_settings(instance, "auth_username_format", "auth_username_format = x-%{user}")
    the_only_skipped(ask_dovecot(readable_site, instance), "dovecot-names", "auth_username_format = x-%{user}")


@real_dovecot
@pytest.mark.parametrize("line", ["username_attribute = email", ""])
def test_login_by_another_claim_than_the_username_is_a_warning_until_the_remedy_was_carried_out(
    readable_site, dovecot_factory, line
):
    """The default of Dovecot is email."""
    instance = dovecot_factory(readable_site.database)
    change_settings(instance, "username_attribute", line)
    found = the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-names")
    assert found.text.startswith("users read the mailbox that is named by their email, ")
    setting = re.search(r": (.*), then", found.remedy)[1]
    change_settings(instance, "introspection_mode", f"introspection_mode = auth\n{setting}")
    change_settings(instance, "username_attribute", setting)
    nothing(ask_dovecot(readable_site, instance))


def damage_certificate(path, key, how):
    """Make a certificate no good; the days of a new one, or what doctor says of it."""
    if how == "gone":
        path.unlink()
        return f"finds no {path}, so no client can begin TLS"
    if how == "no certificate":
        path.write_text("x")
    else:
        make_certificate(path.parent)
        other = path.parent / "other"
        other.mkdir(exist_ok=True)
        shutil.copy(make_certificate(other)[1], key)
    return f"{path} and {key} are not a certificate and its key"


@real_dovecot
def test_path_of_a_certificate_without_its_mark_is_a_problem_in_2_3(readable_site, dovecot_factory):
    instance = dovecot_factory(readable_site.database)
    if installed_version() < (2, 4):
        change_settings(instance, "ssl_cert", f"ssl_cert = {instance.certificate}")
        found = the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-certificate")
        assert f"ssl_cert = <{instance.certificate}" in found.remedy


@real_dovecot
def test_dovecot_without_a_certificate_is_a_problem(readable_site, dovecot_factory):
    instance = dovecot_factory(readable_site.database)
    for name in ("ssl_key", "ssl_server_key_file"):
        change_settings(instance, name, "")
    assert "has no ssl_" in the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-certificate").text


BAD_CERTIFICATES = ["gone", "no certificate", "key of another"]


@real_dovecot
@pytest.mark.parametrize("how", BAD_CERTIFICATES)
def test_certificate_of_dovecot_that_is_no_good_is_a_problem(readable_site, dovecot_factory, how):
    instance = dovecot_factory(readable_site.database)
    says = damage_certificate(instance.certificate, instance.certificate.with_suffix(".key"), how)
    found = the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-certificate")
    assert says in found.text
    make_certificate(instance.config)
    nothing(ask_dovecot(readable_site, instance))


@real_postfix
@pytest.mark.parametrize("how", BAD_CERTIFICATES)
def test_certificate_of_postfix_that_is_no_good_is_a_problem(ask_postfix, postfix, how):
    says = damage_certificate(postfix.certificate, postfix.key, how)
    found = the_only(ask_postfix(), "problem", "postfix-certificate")
    assert says in found.text
    make_certificate(postfix.config)
    nothing(ask_postfix())


@real_postfix
@pytest.mark.parametrize("days", [3, -1])
def test_certificate_that_ends_soon_is_a_warning_and_one_that_has_ended_a_problem(ask_postfix, postfix, monkeypatch, days):
    make_certificate(postfix.config, days=5)
    now = time.time() + (5 - days) * 86400
    monkeypatch.setattr(mailcloakdoctor.time, "time", lambda: now)
    found = the_only(ask_postfix(), "warning" if days > 0 else "problem", "postfix-certificate")
    assert re.search(r"the certificate in \S+ end(s|ed) on 20\d\d-\d\d-\d\d", found.text)
    monkeypatch.undo()
    make_certificate(postfix.config)


@real_postfix
def test_postfix_that_is_stopped_is_a_problem(ask_postfix, postfix):
    (postfix.private / "rewrite").rename(postfix.private / "away")
    found = the_only(ask_postfix(), "problem", "postfix-running")
    assert found.remedy.startswith("postfix start")
    (postfix.private / "away").rename(postfix.private / "rewrite")


@real_postfix
def test_tls_that_is_demanded_without_a_certificate_is_a_problem_and_a_chain_file_is_one(ask_postfix, postfix):
    postfix.set(smtpd_tls_cert_file="", smtpd_tls_key_file="")
    wrong = {finding.text for finding in ask_postfix() if finding.state != "ok"}
    assert len(wrong) == 2
    assert all("demands TLS and has no certificate, so nobody can use it" in text for text in wrong)
    chain = postfix.config / "chain.pem"
    chain.write_text(postfix.key.read_text() + postfix.certificate.read_text())
    postfix.set(smtpd_tls_chain_files=chain)
    nothing(ask_postfix())
    postfix.set(smtpd_tls_chain_files=f"{postfix.key}, {postfix.certificate}")
    nothing(ask_postfix())


@pytest.fixture
def token_site(keycloak_site):
    """A site whose daemon asks a Keycloak for the realm that Dovecot's settings name, and Dovecot's settings."""
    shutil.chown(keycloak_site.database, group="daemon")
    return keycloak_site


def replace_in(folder, old, new):
    """In Dovecot's files, whichever of them has it."""
    texts = {path: path.read_text() for path in folder.iterdir() if path.suffix in (".conf", ".ext")}
    assert any(old in text for text in texts.values()), old
    for path, text in texts.items():
        path.write_text(text.replace(old, new))


@real_dovecot
def test_realm_of_the_sample_settings_is_that_of_the_daemon(token_site, dovecot_factory):
    found = ask_dovecot(token_site, dovecot_factory(token_site.database))
    nothing(found)
    assert named(found, "dovecot-realm")[0].text == "Dovecot takes tokens of realm mail"


OTHER_REALMS = {
    "another realm": (
        "introspection_url = http://127.0.0.1:1/realms/mail/",
        "introspection_url = http://127.0.0.1:1/realms/all%20staff/",
        "problem",
        "introspection_url names realm all staff, and the daemon asks realm mail",
    ),
    "another realm for mail programs": (
        "openid_configuration_url = http://127.0.0.1:1/realms/mail/",
        "openid_configuration_url = http://127.0.0.1:1/realms/Mail/",
        "problem",
        "openid_configuration_url names realm Mail, and the daemon asks realm mail",
    ),
    "another server": (
        "introspection_url = http://127.0.0.1:1/",
        "introspection_url = https://client:not-to-be-shown@sso.example.org/",
        "warning",
        "introspection_url names sso.example.org, and the daemon asks 127.0.0.1: if they differ, so do their users",
    ),
    "sample as it is": (
        "introspection_url = http://127.0.0.1:1/",
        "introspection_url = https://sso.example.org/",
        "warning",
        "introspection_url names sso.example.org",
    ),
}


@real_dovecot
@pytest.mark.parametrize(("old", "new", "state", "says"), OTHER_REALMS.values(), ids=OTHER_REALMS)
def test_tokens_of_another_realm_are_found_until_the_remedy_was_carried_out(token_site, dovecot_factory, old, new, state, says):
    instance = dovecot_factory(token_site.database)
    replace_in(instance.config, old, new)
    found = the_only(ask_dovecot(token_site, instance), state, "dovecot-realm")
    assert says in found.text
    assert "not-to-be-shown" not in str(found)
    place, setting, beginning = re.search(r"(\S+): let (\S+) begin with (\S+), as in ", found.remedy).groups()
    assert (Path(place).name, old.partition(" ")[0]) in ((path.name, setting) for path in instance.config.iterdir())
    (wrong,) = {
        found
        for path in instance.config.iterdir()
        for found in re.findall(rf"\n *({setting} = \S+/realms/[^/]+)", path.read_text())
    }
    replace_in(instance.config, wrong, f"{setting} = {beginning}")
    nothing(ask_dovecot(token_site, instance))


@real_dovecot
def test_mail_programs_may_be_told_another_name_of_keycloak(token_site, dovecot_factory):
    """That by which they reach it from outside."""
    instance = dovecot_factory(token_site.database)
    replace_in(
        instance.config, "openid_configuration_url = http://127.0.0.1:1/", "openid_configuration_url = https://sso.example.org/"
    )
    nothing(ask_dovecot(token_site, instance))


@real_dovecot
def test_realm_that_dovecot_does_not_name_is_not_said_to_be_right(token_site, dovecot_factory):
    instance = dovecot_factory(token_site.database)
    replace_in(instance.config, "http://127.0.0.1:1/realms/mail/", "http://127.0.0.1:1/")
    the_only_skipped(ask_dovecot(token_site, instance), "dovecot-realm", "Its settings name none")


@real_dovecot
def test_tokens_that_nobody_checks_are_a_warning(token_site, tmp_path):
    first = "dovecot_config_version = 2.4.0\ndovecot_storage_version = 2.4.0\n" if installed_version() >= (2, 4) else ""
    (tmp_path / "dovecot.conf").write_text(f"{first}ssl = no\nauth_mechanisms = plain oauthbearer\n")
    found = token_site.findings(
        mailcloakdoctor.check_database, mailcloakdovecot.check_dovecot, dovecot_config=str(tmp_path / "dovecot.conf")
    )
    assert "no user can log in with a token" in the_only(found, "warning", "dovecot-realm").text


@real_dovecot
def test_realm_of_dovecot_is_not_compared_with_one_that_is_not_known(token_site, dovecot_factory):
    token_site.config["keycloak"]["realm"] = 5
    found = ask_dovecot(token_site, dovecot_factory(token_site.database))
    assert [(each.state, each.text) for each in named(found, "dovecot-realm")] == [
        ("skipped", "which realm should Dovecot take tokens of? the configuration is not good")
    ]


def test_file_of_dovecot_2_3_that_is_missing_is_not_taken_for_one_without_a_realm(site, monkeypatch):
    settings = "passdb {\n  args = /nowhere/oauth2.conf.ext\n  driver = oauth2\n}\n"
    monkeypatch.setattr(mailcloakdovecot, "run_program", lambda *_: (settings, ""))
    found = the_only(site.findings(mailcloakdovecot.check_dovecot), "skipped", "dovecot")
    assert found.text == "/nowhere/oauth2.conf.ext: No such file or directory"


def test_realm_is_read_from_settings_of_dovecot_2_4_in_each_form():
    urls = ["https://a.test/realms/x/userinfo", "https://b.test/realms/y"]
    forms = (
        f"oauth2 {{\n  introspection_url = {urls[0]}\n  issuers = {urls[1]}\n}}\n",
        f"oauth2_introspection_url = {urls[0]}\noauth2_issuers = {urls[1]}\n",
        f"passdb oauth2 {{\n  oauth2 {{\n    introspection_url = {urls[0]}\n    issuers = {urls[1]}\n  }}\n}}\n",
    )
    for form in forms:
        assert [each.url for each in mailcloakdovecot.find_token_urls(form)] == urls


@real_dovecot
def test_dovecot_whose_configuration_is_bad_is_a_problem(site, tmp_path):
    path = tmp_path / "dovecot.conf"
    first = "dovecot_config_version = 2.4.0\ndovecot_storage_version = 2.4.0\n" if installed_version() >= (2, 4) else ""
    path.write_text(f"{first}ssll = yes\n")
    found = the_only(site.findings(mailcloakdovecot.check_dovecot, dovecot_config=str(path)), "problem", "dovecot")
    assert (
        f"Dovecot cannot read its configuration: doveconf failed: doveconf: Fatal: Error in configuration file {path}" in found.text
    )
    assert "--dovecot-config" in found.remedy


@real_dovecot
def test_files_for_another_version_of_dovecot_are_a_problem_until_those_of_the_remedy_are_there(site, tmp_path):
    other = "2.3" if installed_version() >= (2, 4) else "2.4"
    shutil.copytree(ROOT / "examples" / f"dovecot-{other}", tmp_path, dirs_exist_ok=True)
    options = {"dovecot_config": str(tmp_path / "dovecot.conf")}
    found = the_only(site.findings(mailcloakdovecot.check_dovecot, **options), "problem", "dovecot")
    assert found.remedy.startswith(f"this file is for Dovecot {other}, and ")
    shutil.copytree(re.search(r"take the files of (\S+),", found.remedy)[1], tmp_path, dirs_exist_ok=True)
    replace_in(tmp_path, "/etc/dovecot/", f"{tmp_path}/")
    (tmp_path / "private").mkdir()
    make_certificate(tmp_path / "private")
    found = site.findings(mailcloakdovecot.check_dovecot, **options)
    assert "Dovecot cannot read its configuration" not in str(found)
    assert named(found, "dovecot-query")[0].state == "ok"


def on_host(site, *commands, arguments=()):
    """What doctor says on this host after these commands, run in a name space of their own: mounts that they make end with it."""
    site.write_config()
    program = [sys.executable, ROOT / "mailcloakctl.py", "--config", site.config_path, "doctor", "--json", *arguments]
    result = subprocess.run(
        ["unshare", "--mount", "--uts", "sh", "-c", "; ".join(["set -e", *commands, 'exec "$@"']), "sh", *map(str, program)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode in (0, 1, 2), result
    return [mailcloakfindings.Finding(**each) for each in json.loads(result.stdout)]


@real_dovecot
def test_dovecot_is_checked_on_a_host_whose_name_the_dns_does_not_answer_for(readable_site, dovecot_factory, short_dir):
    instance = dovecot_factory(readable_site.database)
    (short_dir / "resolv.conf").write_text("nameserver 127.53.53.53\n")
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as silent:
        silent.bind(("127.53.53.53", 53))
        commands = ("hostname mx.far.test", f"mount --bind {short_dir}/resolv.conf /etc/resolv.conf")
        found = on_host(readable_site, *commands, arguments=("--dovecot-config", instance.config / "dovecot.conf"))
    assert named(found, "dovecot-query")[0].state == "ok"


@real_dovecot
def test_dovecot_without_its_driver_for_sqlite_is_a_problem(readable_site, dovecot_factory):
    instance = dovecot_factory(readable_site.database)
    here = f"mount --bind {instance.config} /etc/dovecot"
    folder = run_program("doveconf", "-d", "-h", "mail_plugin_dir") + "/auth"
    (found,) = named(on_host(readable_site, here, f"mount -t tmpfs tmpfs {folder}"), "dovecot")
    assert (found.state, found.remedy.partition(",")[0]) == (
        "problem",
        "install the package dovecot-sqlite (apt-get install dovecot-sqlite)",
    )
    assert f"there is no {folder}/libdriver_sqlite.so" in found.text
    found = on_host(readable_site, here)
    assert "dovecot" not in [each.check for each in found]
    assert named(found, "dovecot-query")[0].state == "ok"


def run_program(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_dovecot_that_was_built_with_sqlite_needs_no_package(monkeypatch):
    """As on Gentoo."""
    monkeypatch.setattr(mailcloakdovecot, "run_program", lambda *_: ("Build options: openssl\nSQL drivers: mysql sqlite\n", ""))
    assert mailcloakdovecot.Dovecot(None).missing_driver() == ""


@real_dovecot
@pytest.mark.parametrize(("kind", "account"), [("uid", MAIL_USER), ("gid", MAIL_GROUP)])
def test_owner_of_the_mailboxes_who_does_not_exist_is_a_problem_until_the_remedy_was_carried_out(
    readable_site, dovecot_factory, short_dir, kind, account
):
    instance = dovecot_factory(readable_site.database)
    spaced = " = " if installed_version() >= (2, 4) else "="
    replace_in(instance.config, f"{kind}{spaced}{account}", f"{kind}{spaced}vmail-x")
    found = the_only(ask_dovecot(readable_site, instance), "problem", "dovecot-mailboxes")
    assert f"give the mailboxes to {'user' if kind == 'uid' else 'group'} vmail-x, and there is no such" in found.text
    command = found.remedy.partition(",")[0].replace("/var/vmail", str(short_dir / "vmail"))
    for name in ("upper", "work"):
        (short_dir / name).mkdir()
    overlay = f"mount -t overlay -o lowerdir=/etc,upperdir={short_dir}/upper,workdir={short_dir}/work overlay /etc"
    arguments = ("--dovecot-config", instance.config / "dovecot.conf")
    assert named(on_host(readable_site, overlay, f"{command} >&2", arguments=arguments), "dovecot-mailboxes")[0].state == "ok"


OWNERS = {
    "2.3": ("userdb {\n  args = uid=vmail gid=500 home=/var/vmail/%u\n  driver = static\n}\n", [("uid", "vmail"), ("gid", "500")]),
    "2.3, defaults": (
        "userdb {\n  default_fields = gid=vmail\n  driver = sql\n}\nmail_uid = post\n",
        [("uid", "post"), ("gid", "vmail")],
    ),
    "2.4": ("userdb sql {\n  query = SELECT uid = 1\n  fields {\n    uid:default = vmail\n  }\n}\n", [("uid", "vmail")]),
}


@pytest.mark.parametrize(("settings", "owners"), OWNERS.values(), ids=OWNERS)
def test_owner_of_the_mailboxes_is_read_from_settings_in_each_form(settings, owners):
    assert list(mailcloakdovecot.find_owners(settings)) == owners


@pytest.mark.parametrize("settings", ["userdb {\n  driver = passwd\n}\n", "userdb {\n  args = uid=%u\n  driver = static\n}\n"])
def test_owner_of_the_mailboxes_that_dovecot_does_not_name_is_not_said_to_be_there(settings):
    (found,) = mailcloakdovecot.check_mailboxes(settings)
    assert (found.state, found.check, found.remedy) == ("skipped", "dovecot-mailboxes", "")


class HttpsKeycloak(NamedTuple):
    """What Dovecot asks of Keycloak, behind https, and the certificate of its CA."""

    userinfo: UserinfoStandIn
    url: str
    ca_file: Path


@pytest.fixture
def https_keycloak(short_dir):
    certificate, key = make_certificate(short_dir)
    userinfo = UserinfoStandIn()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    userinfo._server.socket = context.wrap_socket(userinfo._server.socket, server_side=True)
    with userinfo.running():
        yield HttpsKeycloak(userinfo, userinfo.url.replace("http:", "https:"), certificate)


def can_log_in(instance, userinfo):
    """With a token, at Dovecot itself."""
    login = f"user=alice\x01auth=Bearer {userinfo.token('mail', 'alice')}\x01\x01".encode()
    with instance.imap() as client:
        try:
            return client.authenticate("XOAUTH2", lambda _: login)[0] == "OK"
        except imaplib.IMAP4.error:
            return False


CA_SETTING = "ssl_client_ca_file" if installed_version() >= (2, 4) else "tls_ca_cert_file"
UNTRUSTED = {
    "what the host trusts": ("", True),
    "CAs of the host by name": (f"{CA_SETTING} = /etc/ssl/certs/ca-certificates.crt", True),
    "CAs of the host, as the daemon has it": (f"{CA_SETTING} = /etc/ssl/certs/ca-certificates.crt", False),
    "file that Dovecot may not read": (f"{CA_SETTING} = {{closed}}", True),
}


def reload_and_wait(instance):
    reloads = instance.log().count("SIGHUP received")
    instance._run("doveadm", "reload")
    wait_until(lambda: instance.log().count("SIGHUP received") > reloads, what="reload of Dovecot")


class CaSetting:
    """The line of Dovecot's files that names CA certificates."""

    def __init__(self, folder):
        self.path = folder / ("dovecot.conf" if installed_version() >= (2, 4) else "dovecot-oauth2.conf.ext")
        self.before, self.after = re.split(rf"^ *{CA_SETTING} = .*$", self.path.read_text(), flags=re.MULTILINE)

    def set(self, line):
        self.path.write_text(self.before + line + self.after)


@real_dovecot
@pytest.mark.parametrize(("line", "is_named"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_dovecot_that_does_not_trust_keycloak_is_a_problem_until_the_remedies_were_carried_out(
    token_site, short_dir, https_keycloak, line, is_named
):
    """Each time doctor says what a login at the real Dovecot shows."""
    closed = short_dir / "closed.pem"
    shutil.copy(https_keycloak.ca_file, closed)
    closed.chmod(0o600)
    if is_named:
        token_site.config["keycloak"]["ca_file"] = str(https_keycloak.ca_file)
    (short_dir / "private").mkdir()
    kind = PrivateDovecot24 if installed_version() >= (2, 4) else PrivateDovecot
    instance = kind(short_dir / "private", f"{https_keycloak.url}/realms/mail", token_site.database)
    setting = CaSetting(instance.config)
    setting.set(line.format(closed=closed))
    with running_server(instance):
        for _ in range(3):
            (found,) = named(ask_dovecot(token_site, instance), "dovecot-trust")
            assert can_log_in(instance, https_keycloak.userinfo) == (found.state == "ok"), found
            if found.state == "ok":
                break
            assert found.state == "problem"
            if found.remedy.startswith("chmod"):
                subprocess.run(shlex.split(found.remedy), check=True)
            else:
                place, new = re.fullmatch(r"(\S+): (.*?)(?:, (?:as in|to trust) .*|; then) doveadm reload", found.remedy).groups()
                assert Path(place).name == setting.path.name
                setting.set("" if new.startswith("take ") else re.sub("FILE .*", str(https_keycloak.ca_file), new))
            reload_and_wait(instance)
        assert found.state == "ok"


@real_dovecot
def test_dovecot_that_takes_any_certificate_is_a_problem(token_site, dovecot_factory):
    instance = dovecot_factory(token_site.database)
    replace_in(instance.config, "introspection_url = http://127.0.0.1:1/", "introspection_url = https://127.0.0.1:1/")
    the_only_skipped(
        ask_dovecot(token_site, instance), "dovecot-trust", "does Dovecot trust the certificate of 127.0.0.1? It gave no answer"
    )
    off = "ssl_client_require_valid_cert = no" if installed_version() >= (2, 4) else "tls_allow_invalid_cert = yes"
    CaSetting(instance.config).set(off)
    found = the_only(ask_dovecot(token_site, instance), "problem", "dovecot-trust")
    assert f": take {off.partition(' ')[0]} out, then doveadm reload" in found.remedy


def test_trust_of_dovecot_2_4_is_that_of_its_oauth2_before_that_of_all():
    settings = "oauth2 {\n  introspection_url = https://a.test/realms/x\n  ssl_client {\n    ca_file = /own.pem\n  }\n}\n"
    settings += "ssl_client {\n  ca_dir = /all\n  ca_file = /all.pem\n  require_valid_cert = no\n}\n"
    (found,) = mailcloakdovecot.find_token_urls(settings)
    assert found.trust[:4] == ("ssl_client_ca_file", "/own.pem", "/all", "ssl_client_require_valid_cert")


# ---- Keycloak


def ask_keycloak(site):
    return site.findings(mailcloakdoctor.check_database, mailcloakdoctor.check_keycloak)


def test_good_keycloak_has_no_finding(keycloak_site, realm):
    found = ask_keycloak(keycloak_site)
    nothing(found)
    assert named(found, "keycloak-users")[0].text == "4 users"
    assert CLIENT_SECRET not in str(found)


KEYCLOAKS = {
    "wrong secret": (
        lambda site, realm: site.config["keycloak"].update(client_secret="wrong"),
        "problem",
        "keycloak-token",
        "check keycloak.realm, client_id and client_secret",
    ),
    "wrong realm": (
        lambda site, realm: site.config["keycloak"].update(realm="other"),
        "problem",
        "keycloak-token",
        "check keycloak.realm and keycloak.base_url",
    ),
    "not there": (lambda site, realm: realm.stop(), "problem", "keycloak-token", "look whether Keycloak runs"),
    "no role": (
        lambda site, realm: setattr(realm, "role", ""),
        "problem",
        "keycloak-role",
        "give the service account of client 'mailcloak' the realm-management role view-users",
    ),
    "sees nobody": (
        lambda site, realm: setattr(realm, "role", "query-users"),
        "problem",
        "keycloak-role",
        "the role view-users of realm-management, and no other",
    ),
    "more roles": (
        lambda site, realm: setattr(realm, "token_roles", ["view-users", "query-users", "query-groups", "manage-users"]),
        "warning",
        "keycloak-role",
        "the role view-users of realm-management, and no other",
    ),
    "clock ahead": (lambda site, realm: setattr(realm, "ahead_seconds", 200), "warning", "keycloak-clock", "timedatectl"),
    "clock behind": (lambda site, realm: setattr(realm, "ahead_seconds", -200), "warning", "keycloak-clock", "chronyc"),
    "e-mail by users": (
        lambda site, realm: setattr(realm, "profile_edit", ["admin", "user"]),
        "problem",
        "keycloak-email",
        "examples/keycloak/setup email-by-administrators",
    ),
    "server fault": (lambda site, realm: setattr(realm, "fault", "status-500"), "problem", "keycloak-token", "look whether"),
    "canary missing": (
        lambda site, realm: site.config["keycloak"].update(canary="canary@d1.test"),
        "problem",
        "keycloak-canary",
        "make or enable that user in Keycloak",
    ),
    "federation without canary": (
        lambda site, realm: realm.user("bob").update(federationLink="ldap-1"),
        "warning",
        "keycloak-canary",
        "keycloak.canary: the address of a user of the federation",
    ),
    "federation without users": (
        lambda site, realm: setattr(realm, "components", [{"id": "ldap-1", "name": "ldap"}]),
        "warning",
        "keycloak-canary",
        "cache policy in Keycloak: NO_CACHE",
    ),
}


@pytest.mark.parametrize(("mistake", "state", "check", "remedy"), KEYCLOAKS.values(), ids=KEYCLOAKS)
def test_keycloak_that_is_not_well(keycloak_site, realm, mistake, state, check, remedy):
    mistake(keycloak_site, realm)
    found = the_only(ask_keycloak(keycloak_site), state, check)
    assert remedy in found.remedy
    assert CLIENT_SECRET not in str(found)


def test_keycloak_that_hangs_is_given_up(keycloak_site, realm, monkeypatch):
    monkeypatch.setattr(mailcloakcommon, "ANSWER_SECONDS", 0.5)
    for fault in ("stall", "drip"):
        realm.fault = fault
        started = time.monotonic()
        assert "timed out" in the_only(ask_keycloak(keycloak_site), "problem", "keycloak-token").text
        assert time.monotonic() - started < 5


def test_name_resolution_that_hangs_is_given_up(keycloak_site, monkeypatch):
    monkeypatch.setattr(mailcloakcommon, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(8) or [])
    started = time.monotonic()
    assert "no answer within" in the_only(ask_keycloak(keycloak_site), "problem", "keycloak-token").text
    assert time.monotonic() - started < 6


def test_rights_that_are_needed_are_no_finding(keycloak_site, realm):
    realm.token_roles = ["view-users", "query-users", "query-groups", "view-realm"]
    nothing(ask_keycloak(keycloak_site))


def test_email_that_must_be_verified_may_be_changed_by_users(keycloak_site, realm):
    realm.profile_edit = ["admin", "user"]
    keycloak_site.config["keycloak"]["require_verified_email"] = True
    nothing(ask_keycloak(keycloak_site))


def test_profile_that_cannot_be_read_is_not_checked(keycloak_site, realm):
    realm.profile_edit = None
    the_only_skipped(ask_keycloak(keycloak_site), "keycloak-email", "The user profile of the realm cannot be read")


def test_token_that_cannot_be_read_says_nothing_of_further_roles(keycloak_site, realm):
    realm.token_roles = None
    found = skipped_checks(ask_keycloak(keycloak_site))
    assert set(found) == {"keycloak-role", "keycloak-clock"}
    assert "Its token does not name its roles" in found["keycloak-role"]


def test_keycloak_that_does_not_tell_the_time_is_not_said_to_agree(keycloak_site, realm):
    realm.tells_time = False
    the_only_skipped(ask_keycloak(keycloak_site), "keycloak-clock", "Its token does not say when it was made")


@pytest.mark.parametrize(
    "claims",
    ["[" * 30_000, '{"iat": NaN}', '{"iat": Infinity}', f'{{"iat": 1{"0" * 400}}}', '{"iat": -1}', "null"],
    ids=["deep", "nan", "infinite", "huge", "negative", "null"],
)
def test_token_that_makes_no_sense_tells_neither_roles_nor_time(keycloak_site, realm, claims):
    realm.claims = claims
    found = ask_keycloak(keycloak_site)
    assert set(skipped_checks(found)) == {"keycloak-role", "keycloak-clock"}
    assert named(found, "keycloak-users")[0].text == "4 users"


def test_user_that_the_daemon_cannot_use_is_a_problem(keycloak_site, realm):
    realm.user("bob")["enabled"] = "yes"
    found = the_only(ask_keycloak(keycloak_site), "problem", "keycloak-users")
    assert found.items[0].startswith("bob (")
    realm.user("bob")["username"] = "b" * 500_000
    assert len(the_only(ask_keycloak(keycloak_site), "problem", "keycloak-users").items[0]) < 400
    assert "3 users" in [finding.text for finding in named(ask_keycloak(keycloak_site), "keycloak-users")]


@pytest.fixture
def federated(keycloak_site, realm):
    """bob comes from LDAP, and so does the canary."""
    realm.user("bob")["federationLink"] = "ldap-1"
    realm.add_user("canary", "canary@d1.test", federationLink="ldap-1")
    keycloak_site.config["keycloak"]["canary"] = ["canary@d1.test"]
    return keycloak_site


def provider(name="ldap", policy=None, **config):
    return {"id": f"{name}-1", "name": name, "config": {**({"cachePolicy": [policy]} if policy else {}), **config}}


def test_cache_policy_of_a_federation_that_cannot_be_read_is_said(federated):
    the_only_skipped(ask_keycloak(federated), "keycloak-cache-policy", "is the federation's cache policy in Keycloak NO_CACHE?")


NO_FEDERATIONS = {
    "html": b"<html>",
    "not UTF-8": b"\xff\xfe\xfa",
    "deep": b"[" * 200_000,
    "null": b"null",
    "object": {"a": 1},
    "numbers": [1],
    "no config": [{"id": "x", "name": "x", "config": None}],
    "no id": [{"config": {}}],
    "policy that is a number": [{"id": "x", "name": "x", "config": {"cachePolicy": 5}}],
    "policy that is an object": [{"id": "x", "name": "x", "config": {"cachePolicy": {"a": 1}}}],
}


@pytest.mark.parametrize("answer", NO_FEDERATIONS.values(), ids=NO_FEDERATIONS)
def test_answer_about_federations_that_makes_no_sense_counts_as_none(federated, realm, answer):
    realm.components = answer
    the_only_skipped(ask_keycloak(federated), "keycloak-cache-policy", "is the federation's cache policy in Keycloak NO_CACHE?")


@pytest.mark.parametrize("policy", [None, "DEFAULT", "EVICT_DAILY"])
def test_cache_policy_by_which_a_canary_protects_nobody_is_a_warning(federated, realm, policy):
    realm.components = [provider(policy=policy)]
    found = the_only(ask_keycloak(federated), "warning", "keycloak-cache-policy")
    assert found.remedy == "Keycloak, User federation, ldap: Cache policy NO_CACHE"


def test_cache_policy_no_cache_has_no_finding(federated, realm):
    realm.components = [provider(policy="NO_CACHE"), provider("unused", enabled=["false"])]
    found = ask_keycloak(federated)
    nothing(found)
    assert named(found, "keycloak-cache-policy")[0].text == "federation ldap: NO_CACHE, so it is noticed when a canary is gone"


def test_second_federation_without_a_canary_is_a_warning(federated, realm):
    realm.components = [provider(policy="NO_CACHE"), provider("other", policy="NO_CACHE")]
    assert "1 of 2 federations have no canary" in the_only(ask_keycloak(federated), "warning", "keycloak-canary").text


def test_canary_that_is_disabled_is_a_problem(federated, realm):
    realm.user("canary")["enabled"] = False
    assert "canary canary@d1.test is missing or disabled" in the_only(ask_keycloak(federated), "problem", "keycloak-canary").text


def add_users(realm, number):
    for index in range(number):
        realm.add_user(f"u{index:04}", f"u{index:04}@d1.test")


def test_users_are_read_page_by_page(keycloak_site, realm, monkeypatch):
    monkeypatch.setattr(mailcloakdoctor, "PAGE_USERS", 10)
    add_users(realm, 26)  # and four others
    assert named(ask_keycloak(keycloak_site), "keycloak-users")[0].text == "30 users"
    assert [query["first"] for query in realm.searches if "first" in query] == ["0", "10", "20", "30"]


def test_server_that_gives_the_same_page_again_is_not_asked_for_ever(keycloak_site, realm, monkeypatch):
    monkeypatch.setattr(mailcloakdoctor, "PAGE_USERS", 10)
    realm.honours_first = False
    add_users(realm, 26)
    assert "more than can be read: the first 10 were looked at" in named(ask_keycloak(keycloak_site), "keycloak-users")[0].text
    assert len([query for query in realm.searches if "first" in query]) == 2


def test_of_too_many_users_those_are_looked_up_that_aliases_and_apps_name(keycloak_site, realm, monkeypatch):
    monkeypatch.setattr(mailcloakdoctor, "PAGE_USERS", 10)
    monkeypatch.setattr(mailcloakdoctor, "MAX_USERS", 20)
    monkeypatch.setattr(mailcloakdoctor, "MAX_SINGLE_LOOKUPS", 2)
    add_users(realm, 50)
    keycloak_site.execute("DELETE FROM aliases WHERE alias_email LIKE 'abuse@%'")
    realm.add_user("late", "abuse@d1.test")
    for username in ("u0049", "x1gone", "x2unknown"):
        keycloak_site.insert("aliases", alias_email=f"of-{username}@d1.test", username=username)
    checks = (
        mailcloakdoctor.check_database,
        mailcloakdoctor.check_keycloak,
        mailcloakdoctor.check_role_addresses,
        mailcloakdoctor.check_aliases,
        mailcloakdoctor.check_users,
    )
    found = keycloak_site.findings(*checks)
    assert "more than can be read: the first 20 were looked at, and 2 more that aliases and apps name; not 1 others of these" in (
        named(found, "keycloak-users")[0].text
    )
    assert named(found, "alias-user-missing")[0].items == ("of-x1gone@d1.test (x1gone)",)
    assert named(found, "abuse")[0].items == ("abuse@d2.test",)
    assert skipped_checks(found)["aliases"] == "do all their users exist? 1 were not looked up"
    assert skipped_checks(found)["users"].startswith("nothing is wrong with the 2")
    assert "Not all users were read" in skipped_checks(found)["keycloak-canary"]
    keycloak_site.config["policy"]["domain"] = ["elsewhere.test"]  # nor is it said that nobody is in it
    assert named(keycloak_site.findings(*checks), "users")[0].state == "skipped"


@pytest.mark.real("keycloak")
def test_real_keycloak_is_understood(short_dir, make_config, real_keycloak, monkeypatch):
    monkeypatch.setattr(mailcloakcommon, "ANSWER_SECONDS", 20.0)
    monkeypatch.setattr(mailcloakdoctor, "PAGE_USERS", 5)
    users = [real_user(f"u{number:02}", f"u{number:02}@d1.test") for number in range(12)]
    clients, accounts = zip(
        service_client("seeing", "s" * 20, "view-users"),
        service_client("reading", "s" * 20, "view-users", "view-realm"),
        service_client("mighty", "s" * 20, "view-users", "manage-users"),
        service_client("blind", "s" * 20, "query-users"),
    )
    real_keycloak.create_realm("doctor", [*users, *accounts], clients)
    keycloak = {"base_url": real_keycloak.url, "realm": "doctor", "client_secret": "s" * 20, "canary": "u00@d1.test"}
    site = Site(short_dir, make_config(keycloak=keycloak))

    def wrong(client_id):
        site.config["keycloak"]["client_id"] = client_id
        found = ask_keycloak(site)
        return {(finding.state, finding.check) for finding in found if finding.remedy}, found

    states, found = wrong("seeing")
    assert states == {("problem", "keycloak-email")}  # of a stock realm
    assert named(found, "keycloak-users")[0].text == "12 users"
    assert wrong("mighty")[0] == {("problem", "keycloak-email"), ("warning", "keycloak-role")}
    assert wrong("blind")[0] == {("problem", "keycloak-role")}
    real_keycloak.setup("doctor", "email-by-administrators")
    nothing(wrong("seeing")[1])
    config = {"vendor": ["other"], "connectionUrl": ["ldap://127.0.0.1:1"], "enabled": ["true"], "editMode": ["READ_ONLY"]}
    config.update(
        {"usersDn": ["ou=people"], "usernameLDAPAttribute": ["uid"], "rdnLDAPAttribute": ["uid"], "uuidLDAPAttribute": ["uid"]}
    )
    config.update({"userObjectClasses": ["person"], "bindDn": [""], "authType": ["none"], "importEnabled": ["true"]})
    federation = {
        "name": "ldap",
        "providerId": "ldap",
        "providerType": "org.keycloak.storage.UserStorageProvider",
        "config": config,
    }
    real_keycloak.admin("POST", "/doctor/components", federation)
    assert {("warning", "keycloak-canary"), ("warning", "keycloak-cache-policy")} <= wrong("reading")[0]


# ---- addresses, users, apps


def ask_all(site):
    checks = (
        mailcloakdoctor.check_role_addresses,
        mailcloakdoctor.check_aliases,
        mailcloakdoctor.check_users,
        mailcloakdoctor.check_apps,
    )
    return site.findings(mailcloakdoctor.check_database, mailcloakdoctor.check_keycloak, *checks)


def alias(address, username, **more):
    return lambda site, realm: site.insert("aliases", alias_email=address, username=username, **more)


def app(app_id, **more):
    return lambda site, realm: site.insert("apps", app_id=app_id, secret_hash="{X}secret", **more)


def user(username, email=None, **more):
    return lambda site, realm: realm.add_user(username, email, **more)


def both(*mistakes):
    return lambda site, realm: [mistake(site, realm) for mistake in mistakes]


DATA = {
    "no postmaster": (
        lambda site, realm: site.execute("DELETE FROM aliases WHERE alias_email = 'postmaster@d2.test'"),
        "warning",
        "postmaster",
        ("postmaster@d2.test",),
        "mailcloakctl aliases add postmaster@d2.test USERNAME",
    ),
    "no abuse": (
        lambda site, realm: site.execute("DELETE FROM aliases WHERE alias_email LIKE 'abuse@%'"),
        "warning",
        "abuse",
        ("abuse@d1.test", "abuse@d2.test"),
        "mailcloakctl aliases add abuse@d1.test USERNAME",
    ),
    "postmaster disabled": (
        lambda site, realm: site.execute("UPDATE aliases SET enabled = 0 WHERE alias_email = 'postmaster@d1.test'"),
        "warning",
        "postmaster",
        ("postmaster@d1.test",),
        "mailcloakctl aliases enable postmaster@d1.test",
    ),
    "user of an alias missing": (
        alias("info@d1.test", "Gone"),
        "warning",
        "alias-user-missing",
        ("info@d1.test (gone)",),
        "mailcloakctl aliases add ADDRESS USERNAME --replace",
    ),
    "user of an alias disabled": (
        both(user("dora", "dora@d1.test", enabled=False), alias("info@d1.test", "dora")),
        "warning",
        "alias-user-disabled",
        ("info@d1.test (dora)",),
        "aliases disable ADDRESS",
    ),
    "alias over a primary": (
        alias("bob@d1.test", "alice"),
        "warning",
        "alias-shadow",
        ("bob@d1.test (alias of alice, e-mail of bob)",),
        "mailcloakctl aliases del ADDRESS",
    ),
    "chain": (
        both(user("sales", "sales@d1.test"), alias("info@d1.test", "sales"), alias("sales@d1.test", "alice")),
        "problem",
        "alias-chain",
        ("info@d1.test -> sales@d1.test -> alice@d1.test",),
        "or set policy.mailbox_domain",
    ),
    "circle": (
        both(alias("carol@d1.test", "bob"), alias("bob@d1.test", "carol")),
        "problem",
        "alias-chain",
        ("bob@d1.test -> carol@d1.test -> bob@d1.test", "carol@d1.test -> bob@d1.test -> carol@d1.test"),
        "with the last user",
    ),
    "chain by an extension": (
        both(alias("info@d1.test", "bob"), alias("bob+list@d1.test", "alice"), alias("bob+own@d1.test", "bob")),
        "problem",
        "alias-chain",
        ("info@d1.test -> bob+list@d1.test -> alice@d1.test",),
        "with the last user",
    ),
    "alias elsewhere": (alias("info@other.test", "alice"), "warning", "alias-domain", ("info@other.test",), "policy.domain"),
    "alias in upper case": (alias("Info@d1.test", "alice"), "warning", "alias-spelling", ("Info@d1.test",), "db check --fix"),
    "two with one e-mail": (
        user("bobby", "Bob@D1.test"),
        "warning",
        "primary-shared",
        ("bob@d1.test (bob, bobby)",),
        "give all of them but one another e-mail",
    ),
    "username is another's e-mail": (
        user("bob@d1.test", "bob@d2.test"),
        "problem",
        "login-ambiguous",
        ("bob@d1.test (e-mail of bob)",),
        "rename the users",
    ),
    "e-mail begins with another's name": (
        user("smith", "bob@d2.test"),
        "problem",
        "primary-name",
        ("bob@d2.test (smith)",),
        "set policy.mailbox_domain",
    ),
    "e-mail begins otherwise": (
        user("c.smith", "christine@d1.test"),
        "problem",
        "mailbox-name",
        ("christine@d1.test (c.smith)",),
        "set policy.mailbox_domain",
    ),
    "delimiter in a username": (
        user("x+y", "x+y@d1.test"),
        "problem",
        "username-delimiter",
        ("x+y", "x+y@d1.test"),
        "take the character out of recipient_delimiter",
    ),
    "app expired": (app("printer", expires_at=1), "warning", "app-expired", ("printer",), "apps set APP_ID --expires 90d"),
    "app called like a user": (app("bob"), "warning", "app-name", ("bob",), "mailcloakctl apps add under another name"),
    "owner of an app missing": (
        app("printer", owner="Gone"),
        "warning",
        "app-owner-missing",
        ("printer (gone)",),
        "--owner USERNAME",
    ),
    "owner of an app disabled": (
        both(user("dora", "dora@d1.test", enabled=False), app("printer", owner="dora")),
        "warning",
        "app-owner-disabled",
        ("printer (dora)",),
        "--owner USERNAME",
    ),
}


def test_good_addresses_and_apps_have_no_finding(keycloak_site, realm):
    keycloak_site.insert("aliases", alias_email="info@d1.test", username="alice")
    keycloak_site.insert("aliases", alias_email="off@d1.test", username="gone", enabled=0)
    keycloak_site.insert("apps", app_id="printer", secret_hash="x", owner="alice", expires_at=2**40)
    keycloak_site.insert("apps", app_id="old", secret_hash="x", expires_at=1, enabled=0)
    realm.add_user("erin@d1.test", "erin@d1.test")
    realm.add_user("service-account-x", "bob@d1.test")
    realm.add_user("locked", "locked@d1.test", enabled=False, attributes={"disabledReason": ["permanentLockout"]})
    nothing(ask_all(keycloak_site))


@pytest.mark.parametrize(("mistake", "state", "check", "items", "remedy"), DATA.values(), ids=DATA)
def test_mistake_in_addresses_users_or_apps(keycloak_site, realm, mistake, state, check, items, remedy):
    mistake(keycloak_site, realm)
    (found,) = [finding for finding in ask_all(keycloak_site) if finding.check == check]
    assert (found.state, found.items) == (state, items)
    assert remedy in found.remedy
    others = {finding.check for finding in ask_all(keycloak_site) if finding.state != "ok"} - {check}
    assert others <= {"alias-shadow", "primary-name"}, "a circle shadows, and a name that is an e-mail begins with another's"


@pytest.mark.parametrize(
    "name", [name for name, (*_, remedy) in DATA.items() if re.search("APP_ID --|aliases|SERN|db check", remedy)]
)
def test_command_of_a_remedy_for_addresses_and_apps_helps(keycloak_site, realm, name):
    mistake, _, check, items, _ = DATA[name]
    mistake(keycloak_site, realm)

    def wrong():
        return [finding for finding in ask_all(keycloak_site) if finding.check == check and finding.state != "ok"]

    for item in items:  # one after another
        (found,) = wrong()
        item = item.partition(" ")[0]
        first = re.split(r", or | or set |, unless", found.remedy)[0]
        assert carry_out(keycloak_site, first, ADDRESS=item, APP_ID=item, USERNAME="alice")
    assert not wrong()


def test_mailbox_domain_makes_chains_and_names_harmless(keycloak_site, realm):
    keycloak_site.config["policy"]["mailbox_domain"] = "mailbox.internal"
    for name in ("chain", "e-mail begins with another's name"):
        DATA[name][0](keycloak_site, realm)
    assert {finding.check for finding in ask_all(keycloak_site) if finding.state != "ok"} == {"alias-shadow"}


@pytest.mark.parametrize("mailbox_domain", ["", "mailbox.internal"])
def test_username_that_is_no_ascii_is_a_warning_where_mailboxes_have_it(keycloak_site, realm, mailbox_domain):
    """Without policy.mailbox_domain mail goes to the local part of the e-mail."""
    keycloak_site.config["policy"]["mailbox_domain"] = mailbox_domain
    realm.add_user("zoë", "zoe@d1.test")
    found = [finding for finding in ask_all(keycloak_site) if finding.check == "username-ascii"]
    assert [(finding.state, finding.items) for finding in found] == ([("warning", ("zoë",))] if mailbox_domain else [])


def test_postmaster_may_be_a_primary_email(keycloak_site, realm):
    keycloak_site.execute("DELETE FROM aliases WHERE alias_email = 'postmaster@d1.test'")
    realm.add_user("postmaster", "postmaster@d1.test")
    nothing(ask_all(keycloak_site))


def test_without_keycloak_the_rest_is_checked(keycloak_site, realm):
    realm.stop()
    keycloak_site.insert("apps", app_id="printer", secret_hash="x", owner="gone")
    keycloak_site.insert("aliases", alias_email="info@other.test", username="gone")
    keycloak_site.execute("DELETE FROM aliases WHERE alias_email = 'abuse@d1.test'")
    found = ask_all(keycloak_site)
    assert {finding.check for finding in found if finding.remedy} == {"keycloak-token", "alias-domain"}
    assert [finding.text for finding in named(found, "abuse")] == [
        "does a user have abuse@d1.test? the users of Keycloak were not read"
    ]
    assert {finding.check: finding.text for finding in found if finding.state == "skipped"} == {
        "abuse": "does a user have abuse@d1.test? the users of Keycloak were not read",
        "aliases": "do their users exist? the users of Keycloak were not read",
        "users": "the users of Keycloak were not read",
        "apps": "do their owners exist, and is one called like a user? the users of Keycloak were not read",
    }


def test_static_users_are_checked_like_others(site):
    site.insert("aliases", alias_email="info@d1.test", username="gone")
    found = ask_all(site)
    assert named(found, "alias-user-missing")[0].items == ("info@d1.test (gone)",)
    assert "static_users" in named(found, "keycloak")[0].text


def test_each_user_of_an_alias_with_several_is_checked(site):
    site.insert("aliases", alias_email="team@d1.test", username="alice")
    for target, external in (("gone", 0), ("info", 0), ("jo@elsewhere.test", 1)):
        site.insert("alias_targets", alias_email="team@d1.test", target=target, external=external)
    site.insert("aliases", alias_email="info@d1.test", username="bob")
    found = ask_all(site)
    assert named(found, "alias-user-missing")[0].items == ("team@d1.test (gone)", "team@d1.test (info)")
    assert named(found, "alias-chain")[0].items == ("team@d1.test -> info@d1.test -> bob@d1.test",)


def test_many_are_shown_in_part_to_people_and_whole_to_programs(keycloak_site):
    for number in range(25):
        keycloak_site.insert("aliases", alias_email=f"a{number:02}@d1.test", username="gone")
    found = named(ask_all(keycloak_site), "alias-user-missing")[0]
    assert len(found.items) == 25
    assert found.text.endswith("a09@d1.test (gone) and 15 more")


# ---- the whole of it


@pytest.fixture(scope="module")
def whole(instance, dovecot_factory):
    """A sound installation: a daemon that was started as root and became nobody, Postfix, Dovecot and a realm: what doctor is called with."""
    configure(instance)
    with Realm() as realm:
        for username, email in USERS.items():
            realm.add_user(username, email)
        policy = {"domain": ["d1.test", "d2.test"], "recipient_delimiter": "+"}
        daemon = daemon_behind(instance, group="daemon", keycloak=realm.config(), policy=policy)
        daemon.write_config()
        shutil.chown(daemon.config_path, "root", pwd.getpwnam("nobody").pw_gid)
        daemon.config_path.chmod(0o640)
        try:
            daemon.start()
            for address, username in ROLE_ALIASES.items():
                daemon.ctl("aliases", "add", address, username)
            token = daemon.ctl("apps", "add", "printer", "--generate").stdout.strip()
            dovecot = dovecot_factory(daemon.database)
            yield daemon, realm, token, ["--postfix-config", instance.config, "--dovecot-config", dovecot.config / "dovecot.conf"]
        finally:
            daemon.close()


whole_host = pytest.mark.real("postfix", "dovecot", "root")


def doctor(daemon, *arguments, **options):
    return run_ctl("--config", daemon.config_path, "doctor", *arguments, check=False, **options)


@whole_host
def test_sound_installation_exits_0_and_says_that_there_is_nothing_to_do(whole):
    daemon, _, token, options = whole
    result = doctor(daemon, *options)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    lines = result.stdout.splitlines()
    assert lines[-1] == "next           nothing; mailcloakctl ask recipient ADDRESS shows what becomes of mail for an address"
    assert re.fullmatch(r"\d+ ok", lines[-2])
    assert all(line.startswith("ok ") for line in lines[:-3])
    (secret_hash,) = sqlite3.connect(daemon.database).execute("SELECT secret_hash FROM apps").fetchone()
    shown = doctor(daemon, *options, "--json").stdout + result.stdout
    for secret in (CLIENT_SECRET, token, secret_hash, secret_hash.rpartition(",")[2]):
        assert secret not in shown


@whole_host
def test_warning_exits_1_and_problem_exits_2_with_the_first_problem_as_next_step(whole):
    daemon, realm, _, options = whole
    daemon.ctl("aliases", "add", "info@d1.test", "gone")
    result = doctor(daemon, *options)
    assert result.returncode == 1, result.stdout
    assert "\nnext           alias-user-missing: mailcloakctl aliases add ADDRESS USERNAME --replace" in result.stdout
    realm.profile_edit = ["admin", "user"]
    result = doctor(daemon, *options)
    assert result.returncode == 2
    assert f"\nnext           keycloak-email: {ROOT}/examples/keycloak/setup" in result.stdout
    assert result.stdout.rstrip().endswith("; then mailcloakctl doctor again")
    shown = json.loads(doctor(daemon, *options, "--json").stdout)
    wrong = {finding["check"]: finding for finding in shown if finding["state"] != "ok"}
    assert set(wrong) == {"alias-user-missing", "keycloak-email"}
    assert wrong["alias-user-missing"]["items"] == ["info@d1.test (gone)"]
    assert all(set(finding) == {"check", "state", "text", "remedy", "items"} for finding in shown)
    realm.profile_edit = ["admin"]
    daemon.ctl("aliases", "del", "info@d1.test")


@whole_host
def test_doctor_fits_a_terminal_and_shows_its_progress_there(whole):
    daemon, _, _, options = whole
    code, shown = Terminal("--config", daemon.config_path, "doctor", *options, columns=70).end()
    assert code == 0, shown
    assert "\x1b[32mok      \x1b[0m " in shown
    assert "users of Keycloak read ..." in shown
    plain = re.sub(r"[^\n]*\r", "", re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", shown))
    # the name of a check, then its text: longer only where one word, such as a path, is
    assert all(len(line) <= 70 or " " not in line[32:] for line in plain.splitlines())


@pytest.mark.parametrize(("remedy", "code"), [("", 0), ("run it as root", 1)], ids=["nothing to do", "something to do"])
def test_skipped_check_counts_as_a_warning_where_something_can_be_done(site, capsys, monkeypatch, remedy, code):
    def check(host):
        yield mailcloakfindings.ok("first", "good")
        yield mailcloakfindings.skipped("second", "not to be seen", remedy)
        yield mailcloakfindings.skipped("third", "nor this")

    monkeypatch.setattr(mailcloakdoctor, "CHECKS", (check,))
    doctor = ("--config", str(site.config_path), "doctor")
    assert mailcloakctl.main(list(doctor)) == code
    shown = capsys.readouterr().out
    assert "skipped  second                 not to be seen\n" in shown
    assert "\n2 skipped, 1 ok\n" in shown
    assert ("next           second: run it as root; then" if remedy else "next           nothing; ") in shown
    assert mailcloakctl.main([*doctor, "--json"]) == code
    assert [finding["state"] for finding in json.loads(capsys.readouterr().out)] == ["ok", "skipped", "skipped"]


def test_check_that_fails_itself_does_not_end_the_others(site, capsys, monkeypatch):
    def check_nothing(host):
        yield mailcloakfindings.ok("first", "before")
        raise ZeroDivisionError("for \x1b once")

    def check_more(host):
        yield mailcloakfindings.ok("second", "after")

    monkeypatch.setattr(mailcloakdoctor, "CHECKS", (check_nothing, check_more))
    assert mailcloakctl.main(["--config", str(site.config_path), "doctor"]) == 2
    shown = capsys.readouterr().out
    assert "problem  doctor                 check_nothing failed: error=ZeroDivisionError text=" in shown
    assert "\x1b" not in shown
    assert "ok       second                 after" in shown


@pytest.mark.parametrize("module", mailcloakctl.DOCTOR_MODULES)
def test_doctor_names_its_file_that_is_missing_or_cut_and_the_other_commands_work(site, tmp_path, module):
    """As after a copy by hand, or on a full disk."""
    site.write_config()
    for name in {*MODULES} - {f"{module}.py"}:
        shutil.copy(ROOT / name, tmp_path)

    def run(*words):
        command = [sys.executable, "-B", str(tmp_path / "mailcloakctl.py"), "--config", str(site.config_path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    result = run("doctor")
    assert (result.returncode, result.stdout) == (3, "")
    missing = tmp_path.resolve() / f"{module}.py"
    reason = f"cannot be loaded: No module named '{module}'"
    assert (
        result.stderr == f"mailcloakctl: doctor: {missing} {reason}; install mailcloak again (make install), which puts it there\n"
    )
    assert "postmaster@d1.test" in run("aliases", "list").stdout
    whole = (ROOT / missing.name).read_text(encoding="utf-8")
    for content, reason in (
        ("import module_that_is_not_there\n", "No module named 'module_that_is_not_there'"),
        (whole[: whole.rindex("(") + 1], "'(' was never closed" if sys.version_info >= (3, 10) else "unexpected EOF"),
    ):
        missing.write_text(content)
        result = run("doctor")
        assert result.returncode == 3
        assert result.stderr.startswith(f"mailcloakctl: doctor: {missing} cannot be loaded: {reason}")


THREE_CHECKS = """
import sys, mailcloakctl, mailcloakdoctor, mailcloakfindings

def check(host):
    yield mailcloakfindings.ok("first", "x" * 100_000)
    yield mailcloakfindings.{state}("second", "y", "z")
    with open({ran!r}, "w"):
        pass

def broken(host):
    raise BrokenPipeError

mailcloakdoctor.CHECKS = ({checks},)
sys.exit(mailcloakctl.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(("state", "code"), [("problem", 2), ("warning", 1)])
def test_doctor_whose_reader_goes_away_runs_all_checks_and_exits_with_their_code(site, tmp_path, form, state, code):
    ran = tmp_path / "ran"
    program = THREE_CHECKS.format(state=state, ran=str(ran), checks="check")
    command = [sys.executable, "-c", program, "--db", str(site.database), "doctor", *form]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60, cwd=ROOT)
    os.close(writer)
    assert (result.returncode, result.stderr) == (code, b"")
    assert ran.exists()


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_doctor_that_cannot_print_says_so_and_does_not_exit_as_if_all_were_well(site, tmp_path, form):
    ran = tmp_path / "ran"
    program = THREE_CHECKS.format(state="problem", ran=str(ran), checks="check")
    command = [sys.executable, "-c", program, "--db", str(site.database), "doctor", *form]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60, cwd=ROOT)
    said = "mailcloakctl: doctor: the findings could not be printed: No space left on device, send them elsewhere\n"
    assert (result.returncode, result.stderr) == (3, said)
    assert ran.exists()


def test_pipe_that_breaks_inside_a_check_is_a_fault_of_that_check(site, tmp_path):
    program = THREE_CHECKS.format(state="ok", ran="", checks="broken")
    command = [sys.executable, "-c", program, "--db", str(site.database), "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert (result.returncode, result.stderr) == (2, "")
    assert "broken failed: error=BrokenPipeError" in result.stdout


def test_doctor_that_is_interrupted_does_not_exit_as_if_all_had_been_checked(site, capsys, monkeypatch):
    def check(host):
        raise KeyboardInterrupt

    monkeypatch.setattr(mailcloakdoctor, "CHECKS", (check,))
    assert mailcloakctl.main(["--db", str(site.database), "doctor"]) == 3
    assert capsys.readouterr().err == "mailcloakctl: doctor: interrupted, not all was checked\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--json=1", "doctor"),
        ("--yaml", "doctor"),
        ("doctor", "--json=1"),
        ("doctor", "x"),
        ("--db", "", "doctor"),
        ("--db", "doctor"),
    ],
    ids=" ".join,
)
def test_usage_error_with_doctor_never_says_that_there_are_problems(arguments):
    result = run_ctl(*arguments, check=False)
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith("usage: mailcloakctl")


def test_doctor_alone_loads_the_checks(site):
    code = "import sys, mailcloakctl; code = mailcloakctl.main(sys.argv[1:]); print(code, 'mailcloakdoctor' in sys.modules)"

    def run(*words):
        command = [sys.executable, "-c", code, "--db", str(site.database), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT).stdout.splitlines()[-1]

    assert run("aliases", "list") == "0 False"
    assert run("doctor").endswith(" True")


def test_names_of_findings_are_of_one_form():
    files = ("mailcloakdoctor.py", "mailcloakpostfix.py", "mailcloakdovecot.py")
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    names = set(re.findall(r'(?:(?:ok|skipped|warning|problem|make)\(\s*|^    check = )"([^"]*)"', source, re.MULTILINE))
    assert len(names) > 30
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) and len(name) <= 22 for name in names), names
    listed = re.findall(r"^  ([a-z, -]+?)  ", mailcloakdoctor.__doc__.partition("The checks: ")[2], re.MULTILINE)
    listed = ", ".join(listed).split(", ")
    assert sorted(set(listed)) == sorted(listed), "a check is explained twice"
    assert names | {"postmaster", "abuse", "socket-policy", "socket-aliases"} == set(listed)


def test_doctor_with_another_database(site, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(mailcloakdoctor, "CHECKS", (mailcloakdoctor.check_database,))
    assert mailcloakctl.main(["--db", str(site.database), "doctor", "--json"]) == 0
    assert f"{site.database} has 4 aliases" in capsys.readouterr().out
    assert mailcloakctl.main(["--db", str(tmp_path / "absent.db"), "doctor", "--json"]) == 2
