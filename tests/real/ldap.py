"""A private slapd on a free port of 127.0.0.1, with its configuration and database in a directory of its own.

The system's own slapd and /etc/ldap/slapd.d are not touched; of /etc/ldap only the schema is read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from conftest import wait_until
from real.postfix import free_port

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
BASE = "dc=d1,dc=test"
PEOPLE = f"ou=people,{BASE}"
BIND_DN, BIND_PASSWORD = f"cn=admin,{BASE}", "only-for-these-tests"

CONFIGURATION = """\
include /etc/ldap/schema/core.schema
include /etc/ldap/schema/cosine.schema
include /etc/ldap/schema/inetorgperson.schema
modulepath /usr/lib/ldap
moduleload back_mdb
pidfile {directory}/pid
database mdb
maxsize 16777216
suffix "{base}"
rootdn "{bind_dn}"
rootpw {password}
directory {directory}/data
"""

TREE = f"""\
dn: {BASE}
objectClass: dcObject
objectClass: organization
o: test

dn: {PEOPLE}
objectClass: organizationalUnit
"""

PERSON = f"""
dn: uid={{username}},{PEOPLE}
objectClass: inetOrgPerson
givenName: {{name}}
sn: Test
cn: {{name}} Test
mail: {{email}}
"""


class PrivateSlapd:
    """One server. users are addresses by their user names; they are there from the beginning."""

    def __init__(self, users):
        self.directory = Path(tempfile.mkdtemp(prefix="ldap", dir="/tmp"))
        self.port = free_port()
        self.url = f"ldap://127.0.0.1:{self.port}"
        self.log_path = self.directory / "log"
        self.process = None
        self._configuration = self.directory / "slapd.conf"
        (self.directory / "data").mkdir()
        text = CONFIGURATION.format(directory=self.directory, base=BASE, bind_dn=BIND_DN, password=BIND_PASSWORD)
        self._configuration.write_text(text, encoding="utf-8")
        people = (PERSON.format(username=name, name=name.title(), email=email) for name, email in users.items())
        command = [shutil.which("slapadd", path=PATH), "-f", self._configuration]
        result = subprocess.run(command, input="".join([TREE, *people]), check=False, capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, result.stderr

    def start(self):
        """Start it, on the same port and data each time, and wait until it answers."""
        command = [shutil.which("slapd", path=PATH), "-d", "0", "-h", self.url, "-f", self._configuration]  # -d: in the foreground
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(lambda: self.process.poll() is not None or self._answers(), what="start of slapd")
        assert self.process.poll() is None, self.log_path.read_text()
        return self

    def _answers(self):
        with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(("127.0.0.1", self.port), 5)):
            return True
        return False

    def stop(self):
        """End the process and its connections; its port refuses from then on."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def close(self):
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


def federate(keycloak, realm, slapd, cache_policy):
    """Make slapd a user federation of the realm, as an administrator does: read only, users imported when they are first found."""
    settings = {
        "enabled": "true",
        "vendor": "other",
        "connectionUrl": slapd.url,
        "authType": "simple",
        "bindDn": BIND_DN,
        "bindCredential": BIND_PASSWORD,
        "usersDn": PEOPLE,
        "usernameLDAPAttribute": "uid",
        "rdnLDAPAttribute": "uid",
        "uuidLDAPAttribute": "entryUUID",
        "userObjectClasses": "inetOrgPerson",
        "searchScope": "1",
        "editMode": "READ_ONLY",
        "importEnabled": "true",
        "cachePolicy": cache_policy,
        "connectionTimeout": "1000",
        "readTimeout": "2000",
    }
    component = {
        "name": "ldap",
        "providerId": "ldap",
        "providerType": "org.keycloak.storage.UserStorageProvider",
        "parentId": keycloak.admin("GET", f"/{realm}")["id"],
        "config": {name: [value] for name, value in settings.items()},
    }
    keycloak.admin("POST", f"/{realm}/components", component)
