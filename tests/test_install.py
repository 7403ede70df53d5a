"""make install and make uninstall, into a directory."""

from __future__ import annotations

import ast
import importlib.util
import json
import marshal
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import MODULES, ROOT, USERS

PREFIXES = ("/usr/local", "/usr")
EXAMPLES = {f"share/doc/mailcloak/{path.relative_to(ROOT)}" for path in (ROOT / "examples").rglob("*") if path.is_file()}
BELOW_PREFIX = {
    *EXAMPLES,
    "lib/systemd/system/mailcloak.service",
    "lib/systemd/system/mailcloak.socket",
    "lib/systemd/system/mailcloak-socketmap.socket",
    "lib/sysusers.d/mailcloak.conf",
    "lib/tmpfiles.d/mailcloak.conf",
    "sbin/mailcloak",
    "sbin/mailcloakctl",
    "share/bash-completion/completions/mailcloak",
    "share/bash-completion/completions/mailcloakctl",
    "share/doc/mailcloak/CHANGELOG.md",
    "share/doc/mailcloak/README.md",
    "share/doc/mailcloak/SECURITY.md",
    *(f"share/mailcloak/{name}" for name in MODULES),
    "share/mailcloak/schema.sql",
    "share/mailcloak/without-sockets.conf",
    "share/man/man5/mailcloak.yaml.5",
    "share/man/man8/mailcloak.8",
    "share/man/man8/mailcloakctl.8",
    "share/zsh/site-functions/_mailcloak",
    "share/zsh/site-functions/_mailcloakctl",
}
BELOW_ETC = {"conf.d/mailcloak", "init.d/mailcloak", "logrotate.d/mailcloak", "mailcloak/config.yaml.sample"}
EXECUTABLE = {"sbin/mailcloak", "sbin/mailcloakctl", "init.d/mailcloak", "share/doc/mailcloak/examples/keycloak/setup"}
OPENRC = {"etc/conf.d/mailcloak", "etc/init.d/mailcloak", "etc/logrotate.d/mailcloak"}
SYSTEMD = {f"lib/systemd/system/mailcloak{name}" for name in (".service", ".socket", "-socketmap.socket")}


def run(target, directory, prefix="/usr/local", python=sys.executable, check=True, init="both", **more):
    """What make install and make uninstall run."""
    paths = {"DESTDIR": str(directory), "PREFIX": str(prefix), "PYTHON": str(python)}
    environment = {**os.environ, **paths, "INIT": init, "ANY_PYTHON": "yes", **more}  # that of the tests may be in root's home
    result = subprocess.run(
        ["./install", target], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def files(directory):
    """Every file and link below directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()}


def text(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=PREFIXES)
def installed(request, tmp_path_factory):
    """(DESTDIR, PREFIX, what make install said); not to be changed."""
    directory = tmp_path_factory.mktemp("dest dir")
    directory.chmod(0o755)
    return directory, request.param, run("install", directory, request.param).stdout


def test_everything_is_where_it_belongs_with_its_mode(installed):
    directory, prefix, _ = installed
    below_prefix = {f"{prefix[1:]}/{name}": name for name in BELOW_PREFIX}
    below_etc = {f"etc/{name}": name for name in BELOW_ETC}
    assert files(directory) == {*below_prefix, *below_etc}
    for path, name in {**below_prefix, **below_etc}.items():
        assert (directory / path).stat().st_mode & 0o777 == (0o755 if name in EXECUTABLE else 0o644), path


def test_programs_name_their_interpreter_and_modules_are_as_they_were(installed):
    directory, prefix, _ = installed
    for name in ("mailcloak", "mailcloakctl"):
        assert text(directory / prefix[1:] / "sbin" / name).startswith(f"#!{sys.executable}\n")
    for name in MODULES:
        assert text(directory / prefix[1:] / "share/mailcloak" / name) == text(ROOT / name)


@pytest.mark.parametrize("init", ["openrc", "systemd", "both"])
def test_files_of_one_service_manager_alone(tmp_path, init):
    """update-rc.d of Debian refuses OpenRC's script, and systemctl enable fails with it."""
    said = run("install", tmp_path, "/usr", init=init).stdout
    there = files(tmp_path)
    assert (there >= OPENRC, there.isdisjoint(OPENRC)) == ((True, False) if init != "systemd" else (False, True))
    units = {f"usr/{name}" for name in SYSTEMD}
    assert (there >= units, there.isdisjoint(units)) == ((True, False) if init != "openrc" else (False, True))
    assert ("rc-update add" in said, "systemctl" in said.replace("systemd-sysusers", "")) == (init != "systemd", init != "openrc")


@pytest.mark.parametrize("has_openrc", [True, False], ids=["openrc", "no-openrc"])
def test_service_manager_of_this_host_is_taken(tmp_path, has_openrc):
    """OpenRC's files where there is openrc-run, and systemd does not run."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("cat", "cmp", "dirname", "id", "install", "mkdir", "mktemp", "rm", "sed", "sh"):
        (commands / name).symlink_to(shutil.which(name))
    if has_openrc:
        (commands / "openrc-run").write_text("#!/bin/sh\n")
        (commands / "openrc-run").chmod(0o755)
    run("install", tmp_path / "dest", init="", PATH=str(commands))
    is_openrc = has_openrc and not os.path.isdir("/run/systemd/system")
    assert (tmp_path / "dest/etc/init.d/mailcloak").exists() == is_openrc
    assert (tmp_path / "dest/usr/local/lib/systemd").exists() != is_openrc


@pytest.fixture(scope="module")
def in_place(tmp_path_factory):
    """A PREFIX from which the programs run, with its etc; not to be changed."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("install", "", prefix, SYSCONFDIR=str(prefix / "etc"), UNITDIR=str(prefix / "units"), SBINDIR=str(prefix / "bin"))
    return prefix


def test_modules_are_compiled_where_they_will_run_and_not_in_a_package(in_place, installed):
    """A package compiles after it was unpacked: only there the time of a module, which Python compares, and its reader are known."""
    compiled = {path.name.partition(".")[0]: path for path in (in_place / "share/mailcloak/__pycache__").glob("*.pyc")}
    assert set(compiled) == {name.partition(".")[0] for name in MODULES}
    assert marshal.loads(compiled["mailcloak"].read_bytes()[16:]).co_filename == f"{in_place}/share/mailcloak/mailcloak.py"
    _, prefix, said = installed
    assert f"-m compileall -q {prefix}/share/mailcloak" in said


def test_each_folder_that_is_named_is_used_in_files_and_texts(in_place):
    there = {name for name in files(in_place) if not name.endswith(".pyc")}
    moved = {"lib/systemd/system/": "units/", "sbin/": "bin/"}
    below_prefix = {next((name.replace(a, b) for a, b in moved.items() if name.startswith(a)), name) for name in BELOW_PREFIX}
    assert there == {*below_prefix, *(f"etc/{name}" for name in BELOW_ETC)}
    assert f"\nExecStart={in_place}/bin/mailcloak\n" in text(in_place / "units/mailcloak.service")
    assert f'mailcloak_config:={in_place}/etc/mailcloak/config.yaml}}"' in text(in_place / "etc/init.d/mailcloak")
    assert f".It Pa {in_place}/units/mailcloak.service" in text(in_place / "share/man/man8/mailcloak.8")


def test_uninstall_finds_each_folder_that_is_named(tmp_path):
    folders = {"SYSCONFDIR": "/opt/etc", "UNITDIR": "/lib/systemd/system", "SBINDIR": "/sbin"}
    run("install", tmp_path, **folders)
    assert {"sbin/mailcloak", "opt/etc/init.d/mailcloak", "lib/systemd/system/mailcloak.service"} <= files(tmp_path)
    run("uninstall", tmp_path, **folders)
    assert files(tmp_path) == set()


def test_programs_run_from_there(in_place, make_config, short_dir):
    config = short_dir / "c.yaml"
    config.write_text(yaml.safe_dump(make_config(static_users=USERS)))

    def start(program, *words):
        command = [str(in_place / "bin" / program), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, cwd="/")

    for program in ("mailcloak", "mailcloakctl"):
        assert re.fullmatch(rf"{program} \d+\.\d+\.\d+\n", start(program, "--version").stdout)
    assert f"{in_place}/etc/mailcloak/config.yaml: " in start("mailcloak", "--check-config").stderr
    assert f"{in_place}/etc/mailcloak/config.yaml" in start("mailcloakctl", "doctor").stdout
    found = start("mailcloakctl", "--config", str(config), "doctor", "--json")
    assert json.loads(found.stdout)[0] == {"check": "config", "state": "ok", "text": f"{config} is good", "remedy": "", "items": []}
    checked = start("mailcloak", "--config", str(config), "--check-config")
    assert (checked.returncode, f"config: {config}: good" in checked.stderr) == (0, True)
    assert start("mailcloakctl", "--config", str(config), "aliases", "add", "info@d1.test", "alice").returncode == 0


def test_texts_name_paths_below_the_prefix_alone(installed):
    directory, prefix, _ = installed
    other = {"/usr/local": r"/usr/(?:s?bin|lib|share)/[\w/-]*mailcloak", "/usr": "/usr/local"}[prefix]
    for name in sorted(files(directory)):
        if not name.endswith((".py", ".md", ".png", "sbin/mailcloak", "sbin/mailcloakctl")):
            assert not re.search(other, text(directory / name)), name
    service = text(directory / prefix[1:] / "lib/systemd/system/mailcloak.service")
    assert f"\nExecStart={prefix}/sbin/mailcloak\n" in service
    assert f'mailcloak_command:={prefix}/sbin/mailcloak}}"' in text(directory / "etc/init.d/mailcloak")


def test_manual_pages_name_files_that_were_installed(installed):
    directory, prefix, _ = installed
    for page in (directory / prefix[1:] / "share/man").rglob("*.?"):
        for path in re.findall(rf"(?<![\w.]){prefix}/[\w./-]*\w", text(page)):
            assert os.path.lexists(f"{directory}{path}"), f"{page.name}: {path}"


def test_messages_name_samples_where_they_were_installed(installed):
    directory, prefix, _ = installed
    for name in MODULES:
        code = text(ROOT / name)
        for path in re.findall(r"share/doc/mailcloak/[\w./-]*\w", code):
            assert (directory / prefix[1:] / path).exists(), f"{name}: {path}"
        assert re.findall(r"(?<!share/doc/mailcloak/)(?<! or )examples/.*", code) == [], name


def test_next_steps_say_how_to_make_the_user_and_the_configuration(installed):
    _, prefix, said = installed
    for step in (
        f"systemd-sysusers {prefix}/lib/sysusers.d/mailcloak.conf",
        "useradd --system --user-group --home-dir /var/lib/mailcloak --shell /usr/sbin/nologin mailcloak",
        "install -m 640 -g mailcloak /etc/mailcloak/config.yaml.sample /etc/mailcloak/config.yaml",
        "systemctl daemon-reload && systemctl enable --now mailcloak",
        "rc-service mailcloak start",
    ):
        assert step in said


@pytest.mark.parametrize(("path", "program"), [("/opt/x/sbin", "mailcloak"), ("/opt/x", "/opt/x/sbin/mailcloak")])
def test_program_is_named_in_full_where_its_folder_is_not_in_path(tmp_path, monkeypatch, path, program):
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{path}")
    assert f"  {program} --check-config" in run("install", tmp_path, "/opt/x").stdout


@pytest.mark.real("make")
def test_make_hands_its_variables_on(tmp_path):
    command = ["make", "--no-print-directory", "install", f"DESTDIR={tmp_path}/a b", "PREFIX=/opt/x", f"PYTHON={sys.executable}"]
    command += ["INIT=both", "ANY_PYTHON=yes", "SBINDIR=/opt/x/bin", "SYSCONFDIR=/opt/etc", "UNITDIR=/opt/units"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert {"opt/x/bin/mailcloak", "opt/etc/init.d/mailcloak", "opt/units/mailcloak.service"} <= files(tmp_path / "a b")
    assert "systemctl link /opt/units/mailcloak" in said
    subprocess.run([*command[:2], "uninstall", *command[3:]], cwd=ROOT, capture_output=True, check=True, timeout=60)
    assert files(tmp_path) == set()


@pytest.mark.long
def test_interrupt_of_an_installed_program_shows_no_traceback_at_any_moment(tmp_path):
    places = {"prefix": tmp_path / "usr", "SYSCONFDIR": str(tmp_path / "etc"), "UNITDIR": str(tmp_path / "units")}
    run("install", "", init="systemd", **places)
    program = tmp_path / "usr/sbin/mailcloakctl"
    database = tmp_path / "state.db"
    subprocess.run([program, "--db", database, "aliases", "add", "a@d1.test", "alice"], check=True, capture_output=True, timeout=30)
    for milliseconds in range(0, 240, 12):
        # SIGINT is ignored, and inherited so, where the tests run in the background
        command = ["env", "--default-signal=INT", program, "--db", database, "aliases", "list"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        lines = list(map(int, re.findall(r'mailcloak(?:ctl)?", line (\d+)', said)))  # none but of Python's own start, before these
        assert max(lines, default=0) <= 1 + text(program).split("\n").index("import signal"), said
        assert "share/mailcloak" not in said


def test_remedies_name_documents_where_they_are(installed):
    """The paths of the table of reasons and of doctor, as mailcloakctl shows them."""
    directory, prefix, _ = installed
    share = directory / prefix[1:] / "share"
    named = set()
    for program in MODULES:
        source = text(ROOT / program).replace("{EXAMPLES}", "share/doc/mailcloak/examples")
        named |= set(re.findall(r"share/doc/mailcloak(?:/[\w.-]*\w)+", source))
    assert len(named) > 5
    for place, folder in ((share / "mailcloak", share / "doc/mailcloak"), (ROOT, ROOT)):
        code = "import sys, mailcloakcommon; print(mailcloakcommon.real_paths(sys.stdin.read()))"
        command = [sys.executable, "-B", "-c", code]
        result = subprocess.run(command, input="\n".join(named), cwd=place, capture_output=True, text=True, check=True, timeout=30)
        shown = result.stdout.splitlines()
        assert len(shown) == len(named)
        assert all(path.startswith(f"{folder}/examples") and os.path.exists(path) for path in shown), shown


def test_installed_readme_has_no_link_to_a_file_that_is_not_there_and_names_commands_where_they_are(installed):
    directory, prefix, _ = installed
    folder = directory / prefix[1:] / "share/doc/mailcloak"
    readme = text(folder / "README.md")
    links = set(re.findall(r"\]\(([^):#]+)\)", readme))
    assert len(links) > 10
    assert {link for link in links if not (folder / link).exists()} == set()
    assert set(re.findall(r"(\S*/s?bin)/mailcloakctl", readme)) == {f"{prefix}/sbin"}


@pytest.mark.real("systemd")
def test_systemd_makes_the_user_from_its_file(installed, tmp_path):
    directory, prefix, _ = installed
    (tmp_path / "etc").mkdir()
    command = ["systemd-sysusers", f"--root={tmp_path}", str(directory / prefix[1:] / "lib/sysusers.d/mailcloak.conf")]
    subprocess.run(command, check=True, timeout=30, capture_output=True)
    (line,) = [line.split(":") for line in text(tmp_path / "etc/passwd").splitlines() if line.startswith("mailcloak:")]
    assert (line[5], line[6].rpartition("/")[2]) == ("/var/lib/mailcloak", "nologin")
    assert "mailcloak:" in text(tmp_path / "etc/group")


@pytest.mark.real("systemd")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_systemctl_enables_and_disables_service_and_sockets_together_and_so_does_uninstall(tmp_path, prefix):
    run("install", tmp_path, prefix, init="systemd")

    def systemctl(verb):
        subprocess.run(["systemctl", f"--root={tmp_path}", verb, "mailcloak"], check=True, timeout=30, capture_output=True)
        return {path.name for path in (tmp_path / "etc/systemd/system").rglob("*.wants/*")}

    assert systemctl("enable") == {"mailcloak.service", "mailcloak.socket", "mailcloak-socketmap.socket"}
    assert systemctl("disable") == set()
    systemctl("enable")
    assert "which starts it at boot" not in run("uninstall", tmp_path, prefix).stdout
    assert [path for path in (tmp_path / "etc/systemd").rglob("*") if not path.is_dir()] == []


# ---- again, and away


@pytest.mark.long
def test_second_install_renews_programs_and_leaves_what_an_administrator_wrote(tmp_path):
    run("install", tmp_path)
    config, settings = tmp_path / "etc/mailcloak/config.yaml", tmp_path / "etc/conf.d/mailcloak"
    config.write_text("precious: 1\n")
    settings.write_text('mailcloak_log="/var/log/mail"\n')
    program, sample = tmp_path / "usr/local/share/mailcloak/mailcloak.py", tmp_path / "etc/mailcloak/config.yaml.sample"
    program.write_text("old")
    sample.write_text("old")
    said = run("install", tmp_path).stdout
    assert (text(config), text(settings)) == ("precious: 1\n", 'mailcloak_log="/var/log/mail"\n')
    assert f"kept {settings}" in said
    assert "config.yaml.sample /etc" not in said  # the step that would make one
    assert text(program) == text(ROOT / "mailcloak.py")
    assert text(sample) == text(ROOT / "config.yaml.sample")


@pytest.mark.long
def test_second_install_says_nothing_of_settings_that_were_not_changed(tmp_path):
    run("install", tmp_path)
    assert "kept" not in run("install", tmp_path).stdout


@pytest.mark.real("postfix")
@pytest.mark.parametrize("asks", [True, False])
def test_uninstall_says_that_postfix_still_asks(tmp_path, asks):
    (tmp_path / "main.cf").write_text("smtpd_recipient_restrictions = check_policy_service unix:mailcloak/policy\n" if asks else "")
    (tmp_path / "master.cf").write_text("smtp inet n - y - - smtpd\n")
    folders = {"SYSCONFDIR": str(tmp_path / "etc"), "SBINDIR": str(tmp_path / "sbin"), "UNITDIR": str(tmp_path / "units")}
    said = run("uninstall", "", prefix=tmp_path, MAIL_CONFIG=str(tmp_path), **folders).stdout
    assert ("main.cf or master.cf of Postfix still names mailcloak" in said) == asks


def test_uninstall_leaves_configuration_and_database_alone(tmp_path):
    run("install", tmp_path)
    mine = ["etc/mailcloak/config.yaml", "etc/conf.d/mailcloak", "etc/logrotate.d/mailcloak"]
    mine += ["var/lib/mailcloak/state.db", "usr/local/sbin/another"]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine\n")
    said = run("uninstall", tmp_path).stdout
    assert files(tmp_path) == set(mine)
    assert not (tmp_path / "usr/local/share/mailcloak").exists()
    for name in ("etc/mailcloak", "etc/conf.d/mailcloak", "etc/logrotate.d/mailcloak", "var/lib/mailcloak"):
        assert f"left {tmp_path}/{name}, " in said
    command = re.search("to delete the configuration, aliases and apps for good: (rm -r .*)", said)[1]
    subprocess.run(command, shell=True, check=True, timeout=30)
    assert files(tmp_path) == {"usr/local/sbin/another"}


def test_link_of_a_runlevel_that_is_left_is_named_with_what_deletes_it(tmp_path):
    run("install", tmp_path)
    link = tmp_path / "etc/runlevels/default/mailcloak"
    link.parent.mkdir(parents=True)
    link.symlink_to("/etc/init.d/mailcloak")
    command = re.search("which starts it at boot, if it is installed again: (rm .*)", run("uninstall", tmp_path).stdout)[1]
    subprocess.run(command, shell=True, check=True, timeout=30)
    assert files(tmp_path) == set()


def test_uninstall_of_what_was_not_changed_leaves_no_file(tmp_path):
    run("install", tmp_path, "/usr")
    run("uninstall", tmp_path, "/usr")
    assert files(tmp_path) == set()
    assert not (tmp_path / "etc/mailcloak").exists()
    assert not (tmp_path / "usr/share/doc/mailcloak").exists()
    run("uninstall", tmp_path, "/usr")  # and again


# ---- what cannot be installed


def test_interpreter_without_the_modules_is_refused_naming_them_and_their_packages(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True, timeout=60)
    result = run("install", tmp_path / "dest", python=tmp_path / "bare/bin/python", check=False)
    assert result.returncode != 0
    assert f"{tmp_path}/bare/bin/python lacks yaml and requests, which mailcloak needs" in result.stderr
    assert re.search(r"install what is missing: .*yaml .*requests", result.stderr)
    assert "make install PYTHON=" in result.stderr
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 127", "cannot be run: mailcloak needs Python 3.9 or later"),
        (
            'case "$*" in *executable*) echo "$0";; *version_info*) exit 1;; *) echo Python 3.8.1;; esac',
            "is Python 3.8.1: mailcloak needs",
        ),
        (
            f'case "$*" in *sqlite3*) exit 1;; *executable*) echo "$0";; *) exec {sys.executable} "$@";; esac',
            "SQLite 3.34 or later",
        ),
    ],
    ids=["none", "old", "old-sqlite"],
)
def test_interpreter_that_is_not_fit_is_refused_with_the_reason(tmp_path, script, message):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    result = run("install", tmp_path / "dest", python=python, check=False)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    ("closed", "mode", "found"),
    [
        ("folder", 0o700, "cannot be run by the user mailcloak: others may not enter {}/folder\n"),
        ("folder/python", 0o750, "cannot be run by the user mailcloak: others may not read or run {}/folder/python\n"),
        ("folder", 0o711, ""),
    ],
    ids=["folder", "program", "open"],
)
def test_interpreter_that_the_daemon_cannot_run_is_refused_by_modes(short_dir, closed, mode, found):
    """What others may not enter is named, whatever it is called; one who insists gets it."""
    python = short_dir / "folder/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\ncase "$*" in *sys.executable*) echo "$0";; *) exec {sys.executable} "$@";; esac\n')
    python.chmod(0o755)
    (short_dir / closed).chmod(mode)
    result = run("install", short_dir / "dest", python=python, check=False, ANY_PYTHON="")
    if found:
        assert found.format(short_dir) in result.stderr
        assert "insist: make install ANY_PYTHON=yes" in result.stderr
        assert (result.returncode, (short_dir / "dest").exists()) == (1, False)
        run("install", short_dir / "dest", python=python)
    else:  # the interpreter that it calls may be closed in the same way
        assert f"{short_dir}/folder\n" not in result.stderr


def test_service_manager_that_is_not_known_is_refused(tmp_path):
    result = run("install", tmp_path, check=False, init="sysv")
    assert (result.returncode != 0, "INIT must be openrc, systemd or both, got 'sysv'" in result.stderr) == (True, True)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("prefix", ["usr/local", "/", "/opt/my programs", "/opt/$(id)"])
def test_prefix_that_cannot_be_one_is_refused(tmp_path, prefix):
    result = run("install", tmp_path, prefix, check=False)
    assert result.returncode != 0
    assert "PREFIX" in result.stderr
    assert files(tmp_path) == set()


def imported_packages():
    """The modules that the programs import and that Python does not bring."""
    imported = set()
    for name in MODULES:
        for node in ast.walk(ast.parse(text(ROOT / name))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                imported.update(each.partition(".")[0] for each in names)
    origins = {name: importlib.util.find_spec(name).origin or "" for name in imported}
    return {name for name, origin in origins.items() if re.search("/(site|dist)-packages/", origin)}


def test_modules_that_are_checked_are_those_that_the_programs_import():
    brought_by_requests = {"idna", "urllib3"}
    (checked,) = re.findall(r"for module in (.*); do", text(ROOT / "install"))
    assert imported_packages() - brought_by_requests == set(checked.split())
