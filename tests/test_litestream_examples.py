"""examples/litestream: the units and the init script say what the programs take, and run."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_ctl, wait_until
from real.litestream import EXAMPLES, command_of
from test_mirror import Host, rows_of
from test_openrc import Service
from test_systemd import analyze, setting, settings

import mailcloak
import mailcloakctl

UNITS = sorted(EXAMPLES.glob("*.service"))
SCRIPT = EXAMPLES / "mailcloak-replication.initd"


def test_services_are_those_of_both_roles():
    assert [path.name for path in UNITS] == [f"mailcloak-{name}.service" for name in ("follow", "mirror", "publish", "replicate")]


@pytest.mark.parametrize("service", ["publish", "mirror"])
def test_command_of_mailcloakctl_parses_and_names_its_database_and_the_file_of_litestream(service):
    program, *words = command_of(service)
    assert program == "/usr/local/sbin/mailcloakctl"
    options = mailcloakctl.build_parser().parse_args(words, argparse.Namespace(config=None, db=None, json=False))
    assert options.watch
    assert options.publish == (service == "publish")
    files = [options.source, options.db]
    assert files[:: 1 if options.publish else -1] == [mailcloak.DEFAULT_DATABASE_PATH, shared_file()]


def shared_file():
    (database,) = yaml.safe_load((EXAMPLES / "litestream.yml").read_text())["dbs"]
    return database["path"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_unit_runs_as_the_daemon_and_keeps_its_file_to_itself(path):
    assert setting(path, "User") == setting(path, "Group") == mailcloak.DaemonConfig().user
    assert f"/var/lib/{setting(path, 'StateDirectory')}" == os.path.dirname(shared_file())
    assert (setting(path, "StateDirectoryMode"), setting(path, "UMask")) == ("0700", "0077")
    needs_network = "litestream" in setting(path, "ExecStart").split()[0]
    assert ("AF_INET" in setting(path, "RestrictAddressFamilies")) == needs_network
    assert ("PrivateNetwork" in settings(path)) != needs_network


@pytest.mark.real("systemd")
def test_systemd_understands_every_line_of_the_units(tmp_path):
    for path in UNITS:
        text = re.sub(r"/usr/local/\w+/\w+|/usr/bin/litestream|/bin/rm", "/bin/true", path.read_text())
        (tmp_path / path.name).write_text(text)
    result = analyze("verify", "--man=no", *tmp_path.iterdir())
    said = [line for line in result.stderr.splitlines() if "mailcloak" in line]  # faults in other units of this host are not ours
    assert (result.returncode, said) == (0, [])


@pytest.mark.real("systemd")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_finds_little_exposure(path):
    said = analyze("security", "--offline=true", path).stdout
    assert float(re.search(r"Overall exposure level .*: ([\d.]+)", said)[1]) <= 1.6


def test_init_script_runs_what_the_units_run():
    """The commands with the values that they have without a conf.d."""
    for service in ("publish", "replicate", "follow", "mirror"):
        script = f'. {SCRIPT}; printf \'%s \' "$command"; eval printf "\'%s \'" "$command_args"'
        shell = f"RC_SVCNAME=mailcloak-{service}; {script}"
        said = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
        words = said.removeprefix("/bin/sh -c rm -f /var/lib/mailcloak-shared/shared.db*; exec ").split()
        assert words == command_of(service)


# ---- OpenRC


class ReplicationService(Service):
    """The init script as the service that brings rows."""

    def __init__(self, directory, config, settings):
        super().__init__(directory, config)
        self.name = f"mailcloak-mirror-test-{os.getpid()}"
        self.script, self.settings = Path("/etc/init.d") / self.name, Path("/etc/conf.d") / self.name
        self._lines = settings

    def install(self):
        super().install()
        self.script.write_text(SCRIPT.read_text())
        self.settings.write_text("".join(f'{name}="{value}"\n' for name, value in self._lines.items()))


@pytest.mark.real("root", "openrc")
@pytest.mark.xdist_group("openrc")
def test_init_script_brings_rows_until_it_is_stopped(short_dir, make_config):
    writer = Host(short_dir / "writer")
    writer("aliases", "add", "info@d1.test", "alice")
    own, shared = short_dir / "own", short_dir / "shared"
    own.mkdir()
    program = short_dir / "mailcloakctl"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/mailcloakctl.py" "$@"\n')
    program.chmod(0o755)
    values = {
        "mailcloakctl": program,
        "mailcloak_database": own / "state.db",
        "mailcloak_shared_dir": shared,
        "mailcloak_user": "root:root",  # others may not be able to run this Python
        "replication_log": short_dir / "log",
    }
    service = ReplicationService(short_dir, make_config(), values)
    try:
        service.install()
        service.rc("start")
        wait_until(lambda: "No such file" in (short_dir / "log").read_text(), what="the first line")
        run_ctl("--db", short_dir / "published.db", "db", "mirror", writer.path, "--publish")
        assert shared.stat().st_mode & 0o777 == 0o700
        os.rename(short_dir / "published.db", shared / "shared.db")
        wait_until((own / "state.db").exists, what="the database")
        assert rows_of(own / "state.db") == rows_of(writer.path)
        service.rc("stop")
        assert "started" not in service.rc("status", check=False)[1]
    finally:
        service.remove()
