"""Moving in from the Go program: both layouts of its database, both forms of its configuration, and the steps of README.md."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import stat

import pytest
import yaml
from conftest import ROOT, Daemon, config_in, run_ctl_process
from test_mailcloakctl import Ctl

import mailcloak

APPS = """
CREATE TABLE apps (app_id TEXT PRIMARY KEY, secret_hash TEXT NOT NULL, enabled INTEGER NOT NULL DEFAULT 1, {time} INTEGER NOT NULL);
CREATE TABLE app_from (app_id TEXT NOT NULL, from_addr TEXT NOT NULL, enabled INTEGER NOT NULL DEFAULT 1{more}, PRIMARY KEY (app_id, from_addr),
    FOREIGN KEY (app_id) REFERENCES apps (app_id) ON DELETE CASCADE);
INSERT INTO apps (app_id, secret_hash, enabled, {time}) VALUES ('Printer', '{{ARGON2ID}}$a', 1, 1000), ('old', '{{ARGON2ID}}$b', 0, 2000);
INSERT INTO app_from (app_id, from_addr, enabled) VALUES ('Printer', 'Scan@d1.test', 1), ('Printer', 'x@d2.test', 1), ('old', 'o@d1.test', 0);
"""
LAYOUTS = {
    "first": """
CREATE TABLE aliases (alias_email TEXT PRIMARY KEY, username TEXT NOT NULL, enabled INTEGER NOT NULL DEFAULT 1, updated_at INTEGER);
INSERT INTO aliases (alias_email, username, enabled) VALUES ('Info@d1.test', 'Alice', 1), ('sales@d1.test', 'bob', 0);
"""
    + APPS.format(time="created_at", more=""),
    "second": """
CREATE TABLE domains (domain_name TEXT PRIMARY KEY, enabled INTEGER NOT NULL DEFAULT 1, updated_at INTEGER);
CREATE TABLE aliases (alias_email TEXT PRIMARY KEY, target_user TEXT NOT NULL, alias_domain_name TEXT NOT NULL,
    enabled INTEGER NOT NULL DEFAULT 1, updated_at INTEGER, FOREIGN KEY (alias_domain_name) REFERENCES domains (domain_name));
INSERT INTO domains (domain_name, enabled) VALUES ('d1.test', 1), ('d2.test', 0);
INSERT INTO aliases (alias_email, target_user, alias_domain_name, enabled)
    VALUES ('Info@d1.test', 'Alice', 'd1.test', 1), ('sales@d1.test', 'bob', 'd1.test', 0), ('info@d2.test', 'carol', 'd2.test', 1);
"""
    + APPS.format(time="updated_at", more=", updated_at INTEGER"),
}
ALIASES = {
    "first": [("info@d1.test", "alice", 1), ("sales@d1.test", "bob", 0)],
    "second": [("info@d1.test", "alice", 1), ("info@d2.test", "carol", 0), ("sales@d1.test", "bob", 0)],
}
CONFIGS = {
    "keycloak": """
keycloak: {base_url: "https://sso.example.org", realm: mail, client_id: mailcloak, client_secret: s3cr3t-of-the-client}
sqlite: {path: /var/lib/mailcloak/state.db}
policy: {domain: d1.test, cache_ttl_seconds: 60, keycloak_failure_mode: dunno}
sockets: {policy_socket: /var/spool/postfix/private/mailcloak-policy, socketmap_socket: /var/spool/postfix/private/mailcloak-socketmap,
  socket_owner_user: root, socket_owner_group: root, socket_mode: 0660}
""",
    "idp": """
idp: {provider: keycloak, keycloak: {base_url: "https://sso.example.org", realm: mail, client_id: mailcloak,
  client_secret: s3cr3t-of-the-client, cache_ttl_seconds: 60}, authentik: {base_url: "x", api_token: y}}
sqlite: {path: /var/lib/mailcloak/state.db}
policy: {idp_failure_mode: dunno}
sockets: {policy_socket: /var/spool/postfix/private/mailcloak-policy, socketmap_socket: /var/spool/postfix/private/mailcloak-socketmap,
  socket_owner_user: root, socket_owner_group: root, socket_mode: "0660"}
daemon: {user: root}
admin: {listen: "127.0.0.1:1"}
""",
}


@pytest.fixture
def ctl(tmp_path):
    """The command where there is no database yet."""
    return Ctl(tmp_path / "state.db")


def make_go(ctl, layout, *statements):
    path = ctl.path.parent / "go.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(LAYOUTS[layout])
        for statement in statements:
            database.execute(statement)
        database.commit()
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_of_a_database_comes_in(ctl, layout):
    path = make_go(ctl, layout)
    before = path.read_bytes()
    result = ctl("migrate-from-go", path)
    assert ctl.aliases() == ALIASES[layout]
    assert ctl.rows("SELECT app_id, secret_hash, enabled, created_at FROM apps ORDER BY app_id") == [
        ("old", "{ARGON2ID}$b", 0, 2000),
        ("printer", "{ARGON2ID}$a", 1, 1000),
    ]
    in_other_domain = 0 if layout == "second" else 1
    assert ctl.senders() == [("old", "o@d1.test", 0), ("printer", "scan@d1.test", 1), ("printer", "x@d2.test", in_other_domain)]
    assert result.stdout == (
        f"migrate-from-go: {len(ALIASES[layout])} aliases added, 2 apps in it\nmigrate-from-go: policy.domain must list: d1.test\n"
    )
    assert path.read_bytes() == before
    assert {each.name for each in path.parent.iterdir()} == {"go.db", "state.db"}
    assert ctl("db", "check").returncode == 0
    written = ctl.path.read_bytes()
    again = json.loads(ctl("migrate-from-go", path, "--json").stdout)
    assert again == {"changed": False, "dry_run": False, "aliases_added": 0, "apps": 2, "domains": ["d1.test"]}
    assert ctl.path.read_bytes() == written


def test_what_is_in_the_wal_comes_in_and_stays_there(ctl):
    path = make_go(ctl, "second")
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute(
            "INSERT INTO aliases (alias_email, target_user, alias_domain_name) VALUES ('new@d1.test', 'dora', 'd1.test')"
        )
        database.commit()
        before = path.read_bytes(), (path.parent / "go.db-wal").read_bytes()
        assert before[1]
        ctl("migrate-from-go", path)
        assert (path.read_bytes(), (path.parent / "go.db-wal").read_bytes()) == before
    assert ("new@d1.test", "dora", 1) in ctl.aliases()


def test_dry_run_makes_nothing(ctl):
    path = make_go(ctl, "first")
    new = ctl.path.parent / "new.yaml"
    old = ctl.path.parent / "old.yaml"
    old.write_text(CONFIGS["idp"])
    result = ctl("migrate-from-go", path, "--dry-run", "--go-config", old, "--new-config", new)
    assert "2 aliases would be added, 2 apps in it" in result.stdout
    assert not ctl.path.exists()
    assert not new.exists()


REFUSED = {
    "bad alias": ("INSERT INTO aliases (alias_email, username) VALUES ('@d1.test', 'x')", "row 3: '@d1.test' is not an address"),
    "bad user": ("INSERT INTO aliases (alias_email, username) VALUES ('x@d1.test', 'x y')", "row 3: 'x y' holds a space"),
    "app twice": ("INSERT INTO apps VALUES ('printer', 'x', 1, 1)", "of apps: printer is there twice"),
    "hash that is no text": ("INSERT INTO apps VALUES ('none', x'00', 1, 1)", "of apps: none has no hash that could be taken over"),
    "hash that is not UTF-8": ("INSERT INTO apps VALUES ('odd', CAST(x'ff' AS TEXT), 1, 1)", "of apps: odd has no hash"),
    "bad app": ("INSERT INTO apps VALUES ('my printer', 'x', 1, 1)", "row 3: of apps: APP_ID is not an app id"),
    "bad sender": ("INSERT INTO app_from VALUES ('printer', 'scan', 1)", "row 4: of app_from: 'scan' is not an address"),
    "sender of no app": ("INSERT INTO app_from VALUES ('gone', 'x@d1.test', 1)", "row 4: of app_from: gone is no app"),
    "a database of ours": ("PRAGMA user_version = 2", "is a database of this mailcloak"),
    "of another program": ("DROP TABLE aliases", "is no database of the Go program"),
}


@pytest.mark.parametrize(("statement", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_row_stops_the_whole_unless_skip_bad(ctl, statement, says):
    path = make_go(ctl, "first", statement)
    message = ctl.refuses("migrate-from-go", path)
    assert says in message
    assert not ctl.path.exists()
    if "row " in says:
        assert "1 row is bad, nothing was changed; correct them, or leave them out with --skip-bad" in message
        ctl("migrate-from-go", path, "--skip-bad")
        assert ctl.aliases() == ALIASES["first"]
        assert [row[0] for row in ctl.apps()] == ["old", "printer"]


def test_what_is_here_already_is_not_replaced(ctl):
    path = make_go(ctl, "first")
    ctl("aliases", "add", "info@d1.test", "zoe")
    assert "info@d1.test leads to zoe here already" in ctl.refuses("migrate-from-go", path)
    ctl("aliases", "add", "info@d1.test", "alice", "--replace")
    ctl("apps", "add", "printer", "--generate")
    assert "printer is here already, with another token" in ctl.refuses("migrate-from-go", path)
    ctl("apps", "del", "printer")
    ctl("aliases", "disable", "info@d1.test")
    ctl("migrate-from-go", path)
    assert ctl.aliases() == [("info@d1.test", "alice", 0), ("sales@d1.test", "bob", 0)]


@pytest.mark.parametrize("spoil", ["missing", "text", "empty"])
def test_file_that_is_no_database_is_refused(ctl, spoil):
    path = ctl.path.parent / "go.db"
    if spoil != "missing":
        path.write_text("x" * 5000 if spoil == "text" else "")
    assert str(path) in ctl.refuses("migrate-from-go", path)
    assert not ctl.path.exists()


# ---- its configuration


@pytest.mark.parametrize("form", CONFIGS)
def test_configuration_becomes_ours(ctl, form):
    old, new = ctl.path.parent / "old.yaml", ctl.path.parent / "new.yaml"
    old.write_text(CONFIGS[form])
    result = ctl("migrate-from-go", make_go(ctl, "second"), "--go-config", old, "--new-config", new)
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    config = mailcloak.load_config(str(new)) if form == "idp" else None
    written = yaml.safe_load(new.read_text())
    assert written["keycloak"] == {
        "base_url": "https://sso.example.org",
        "realm": "mail",
        "client_id": "mailcloak",
        "client_secret": "s3cr3t-of-the-client",
    }
    assert written["policy"] == {
        "domain": "d1.test" if form == "keycloak" else ["d1.test"],
        "cache_ttl_seconds": 60,
        "keycloak_failure_mode": "dunno",
    }
    assert written["sockets"]["socket_mode"] == "0660"
    assert written["sqlite"] == {"path": str(ctl.path)}
    assert written["daemon"] == {"user": "root" if form == "idp" else "mailcloak"}
    assert ("admin has no counterpart" in result.stderr) == (form == "idp")
    assert "s3cr3t" not in result.stdout + result.stderr
    assert config is None or config.policy.domain == {"d1.test"}


def test_configuration_that_cannot_be_made_changes_nothing(ctl):
    path, old, new = make_go(ctl, "first"), ctl.path.parent / "old.yaml", ctl.path.parent / "new.yaml"
    command = ("migrate-from-go", path, "--go-config", old, "--new-config")
    assert "cannot be read: No such file" in ctl.refuses(*command, new)
    for text, says in (("[", "it is not YAML"), ("x", "no configuration"), ("idp: {provider: authentik}", "asks Keycloak only")):
        old.write_text(text)
        assert says in ctl.refuses(*command, new)
    old.write_text(CONFIGS["idp"])
    assert "name both" in ctl.refuses(*command[:-1])
    ctl("aliases", "add", "other@d1.test", "bob")
    assert "cannot be written: File exists" in ctl.refuses(*command, ctl.path)
    ctl("aliases", "add", "alice@d1.test", "bob")
    assert "--force" in ctl.refuses(*command, new)  # info leads to alice, whose mailbox leads on to bob
    assert not new.exists()


# ---- README.md


def test_steps_of_readme_lead_to_a_daemon_that_answers(short_dir, ctl):
    """Each command of the section, with paths of this test in place of those of a host."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Coming from the Go program") :]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)[1]
    commands = [line[2:] for line in block.splitlines() if line.startswith("# mailcloakctl")]
    assert len(commands) == 3
    go, old, new = make_go(ctl, "second"), ctl.path.parent / "old.yaml", ctl.path.parent / "new.yaml"
    old.write_text(CONFIGS["idp"])
    paths = {"/srv/old-mailcloak/state.db": go, "/srv/old-mailcloak/config.yaml": old, "/etc/mailcloak/config.yaml": new}
    for command in commands:
        words = [str(paths.get(word, word)) for word in command.split()[1:]]
        place = [] if words[0] == "--config" else ["--db", str(ctl.path)]
        result = run_ctl_process(*place, *words)
        assert result.returncode == 0, result.stderr
    assert ctl.aliases() == ALIASES["second"]
    config = config_in(short_dir, sqlite={"path": str(ctl.path)}, static_users={"alice": "alice@d1.test"})
    daemon = Daemon(short_dir, config).start()
    try:
        assert daemon.ask_map("alias info@d1.test") == "OK alice@d1.test"
        assert daemon.ask_map("alias info@d2.test") == "NOTFOUND "
    finally:
        daemon.close()
