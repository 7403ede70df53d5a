"""The packages: that of Debian (`make deb`), what apt makes of it on Debian 12 and 13, the wheel, and those that are not run here."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import MODULES, ROOT, USERS
from test_install import imported_packages

import mailcloak

DEBIAN = ROOT / "packaging/debian"
BEFORE = "0.0.1"  # the version of the package that is upgraded


def run(*command, **options):
    """What the command says; it fails the test if the command fails."""
    options = {"cwd": ROOT, "timeout": 120, "stdin": subprocess.DEVNULL, **options}
    result = subprocess.run(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package, with its .changes beside it, and one of before."""
    built = tmp_path_factory.mktemp("deb")
    (built / f"mailcloak_{BEFORE}_all.deb").write_text("of before")
    os.utime(built / f"mailcloak_{BEFORE}_all.deb", (0, 0))
    said = run("make", "--no-print-directory", "deb", f"DEB_DIR={built}")
    file = built / f"mailcloak_{mailcloak.__version__}_all.deb"
    assert said.endswith(f"apt install ./{file}\n")
    return file


@pytest.mark.real("make", "deb")
def test_package_of_before_is_still_there(package):
    assert (package.parent / f"mailcloak_{BEFORE}_all.deb").read_text() == "of before"


def unpack(package, folder):
    run("dpkg-deb", "--raw-extract", package, folder)
    return folder


@pytest.mark.real("make", "deb")
def test_lintian_finds_no_error_and_no_warning(package):
    (changes,) = package.parent.glob("*.changes")
    said = run("lintian", "--allow-root", "--fail-on", "error,warning", changes)
    assert not re.search(r"^[EW]:", said, re.MULTILINE), said


@pytest.mark.real("make", "deb")
def test_package_has_the_version_of_the_program_and_what_it_imports(package):
    field = {name: run("dpkg-deb", "--field", package, name).strip() for name in ("Version", "Depends", "Architecture")}
    assert (field["Version"], field["Architecture"]) == (mailcloak.__version__, "all")
    assert {f"python3-{name}" for name in imported_packages()} <= set(re.findall(r"[\w-]+", field["Depends"]))


@pytest.mark.real("make", "deb")
def test_package_has_programs_units_documents_and_rules_for_the_log(package, tmp_path):
    tree = unpack(package, tmp_path / "tree")
    for program in ("mailcloak", "mailcloakctl"):
        text = (tree / "usr/sbin" / program).read_text()
        assert text.startswith("#!/usr/bin/python3\nimport signal\nimport sys\n")
        assert '\nsys.path.insert(0, "/usr/share/mailcloak")\n' in text
    service = next(
        path / "systemd/system/mailcloak.service" for path in (tree / "lib", tree / "usr/lib") if (path / "systemd").is_dir()
    )
    assert "\nExecStart=/usr/sbin/mailcloak\n" in service.read_text()
    for path in (
        *("lib/sysusers.d/mailcloak.conf", "lib/tmpfiles.d/mailcloak.conf"),
        *("share/doc/mailcloak/README.md", "share/doc/mailcloak/examples/postfix/main.cf"),
        *("share/doc/mailcloak/examples/openrc/mailcloak.initd", "share/man/man8/mailcloakctl.8.gz"),
        *("share/bash-completion/completions/mailcloakctl", "share/zsh/vendor-completions/_mailcloakctl"),
    ):
        assert (tree / "usr" / path).is_file(), path
    # what dpkg asks about after a change; config.yaml is not among it
    assert set((tree / "DEBIAN/conffiles").read_text().split()) == {
        *("/etc/mailcloak/config.yaml.sample", "/etc/logrotate.d/mailcloak", "/etc/logcheck/ignore.d.server/mailcloak"),
    }
    assert not list(tree.rglob("*.pyc"))


def test_logcheck_leaves_out_lines_of_info_and_shows_warnings(make_daemon):
    """Each line as it is in the journal, and as it is in syslog, where the daemon writes no time of its own."""
    daemon = make_daemon(static_users=USERS).start()  # warns that there is no database yet
    daemon.ask(recipient="alice@d1.test")
    daemon.ask(recipient="nobody@d1.test")
    daemon.ask_map("alias x@d1.test")
    daemon.reload()
    assert daemon.stop() == 0
    lines = []
    for line in daemon.log().splitlines():
        date, time, message = line.split(" ", 2)
        lines += [f"Nov 27 04:31:50 mx mailcloak[12]: {date} {time} {message}", f"Nov  7 04:31:50 mx mailcloak[12]: {message}"]
    assert {"debug", "info", "warning"} <= {line.split("]: ")[1].split()[0] for line in lines[1::2]}
    rules = ["--file", str(DEBIAN / "mailcloak.logcheck.ignore.server")]
    shown = subprocess.run(
        ["grep", "-E", "-v", *rules], input="\n".join(lines), capture_output=True, text=True, check=False, timeout=30
    )
    assert shown.stdout.splitlines() == [line for line in lines if re.search(r"[\d:] (warning|error) ", line)]


@pytest.mark.long
@pytest.mark.timeout(1200)  # where the tree must be made first
@pytest.mark.real("root", "make", "deb", "debootstrap")
@pytest.mark.parametrize("release", ["12", "13"])
def test_apt_installs_upgrades_removes_and_purges_it(package, tmp_path, release):
    """What is looked at: tests/real/package."""
    before = unpack(package, tmp_path / "before")
    control = before / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*", f"Version: {BEFORE}", control.read_text()))
    (before / "usr/share/mailcloak/mailcloakold.py").write_text("# a module that the next version no longer has\n")
    run("dpkg-deb", "--root-owner-group", "--build", before, tmp_path / "before.deb")
    (tmp_path / "mailcloak.deb").write_bytes(package.read_bytes())
    environment = {**os.environ, "MNT": str(tmp_path)}
    said = run("tests/real/debian", release, "tests/real/package", env=environment, timeout=1100)
    assert f"package: all is as it should be, on Debian {release}" in said


# ---- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, opened; made of a copy, since setuptools leaves files beside the sources, and takes those of before into the next."""
    folder = tmp_path_factory.mktemp("wheel")
    aside = shutil.ignore_patterns(".*", "build", "tests", "bench", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "sources", ignore=aside)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *options, folder / "sources", cwd=folder)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


def test_wheel_has_modules_units_manual_pages_samples_and_documents(wheel):
    names = {name.rpartition(".data/data/")[2] for name in wheel.namelist()}
    data = {name for name in names if name.startswith("share/")}
    folders = ("completions", "examples", "man", "openrc", "systemd")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [*ROOT.glob("*.md"), ROOT / "schema.sql", ROOT / "config.yaml.sample"]
    assert sorted(name.rpartition("/")[2] for name in data) == sorted(path.name for path in files)
    assert {f"share/doc/mailcloak/{path.relative_to(ROOT)}" for path in (ROOT / "examples").rglob("*") if path.is_file()} <= data
    assert set(MODULES) <= names


def test_wheel_says_whose_it_is_and_declares_what_the_program_imports(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Author-email"].startswith("mailcloak contributors <")
    assert (metadata["License"], metadata["Version"]) == ("MIT", mailcloak.__version__)
    assert metadata["Project-URL"].startswith("Homepage, https://")
    declared = {re.split("[>=]", line)[0].lower().replace("pyyaml", "yaml") for line in metadata.get_all("Requires-Dist")}
    assert declared == imported_packages()


# ---- packages that nobody has built here


def test_every_package_has_the_version_of_the_program():
    assert re.search(r"^pkgver=(.*)", (ROOT / "packaging/alpine/APKBUILD").read_text(), re.MULTILINE)[1] == mailcloak.__version__
    assert [path.name for path in (ROOT / "packaging/gentoo/mail-filter").rglob("*.ebuild")] == [
        f"mailcloak-{mailcloak.__version__}.ebuild"
    ]
    assert f"/mailcloak_{mailcloak.__version__}_all.deb\n" in (ROOT / "README.md").read_text()
    assert (DEBIAN / "changelog").read_text().startswith(f"mailcloak ({mailcloak.__version__}) ")


@pytest.mark.real("deb")
def test_alpine_package_has_compiled_modules_that_python_takes_whenever_they_were_written(tmp_path):
    """package() of the APKBUILD in a plain shell. It uses /usr/bin/python3 and its modules, as Debian's package does."""
    script = f"pkgdir={tmp_path}; cd {ROOT}; . packaging/alpine/APKBUILD; set -eu; package"
    run("sh", "-c", script)
    compiled = [path for path in (tmp_path / "usr/share/mailcloak/__pycache__").iterdir() if path.name.startswith("mailcloak.")]
    (flags,) = {path.read_bytes()[4] for path in compiled}  # PEP 552: 1 for a hash, and no 2, which would have it checked
    assert flags == 1
    assert (tmp_path / "etc/init.d/mailcloak").is_file()
    assert not (tmp_path / "usr/lib/systemd").exists()


@pytest.mark.real("apparmor")
def test_apparmor_understands_the_profile():
    run("apparmor_parser", "--skip-kernel-load", "--skip-cache", "packaging/apparmor/mailcloak")


@pytest.mark.real("checkmodule")
def test_selinux_module_compiles(tmp_path):
    run("checkmodule", "-M", "-m", "-o", tmp_path / "mailcloak.mod", "packaging/selinux/mailcloak.te")
