# mailcloakowner: databases of other users, used by root. MIT licence, see LICENSE.
"""What mailcloakctl does as root with a database that belongs to another user, such as the daemon's: it acts as that user.

A user who owns a directory decides what root finds by a path in it: they could put a link there, or a journal beside the database,
which SQLite rolls back before it reads, and whose last page names a file that it deletes (the SQLite database file format, section 3,
"super-journal"). So root looks who decides what it finds by the path, and then uses the file with no more rights than that user has.
As any other user, all this changes nothing.

  owner_on_the_way()       who decides what root finds by a path
  acting_as_owner_of()     use files as that user, for a moment
  connect()                a connection whose every statement runs so
  prepare()                the database with its schema, made or brought to this version so

The program must have one thread: the ids that change are those of the whole process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import sqlite3
import stat
from typing import Any

import mailcloak

NOBODYS_GROUP = 65534  # of a user who is not known on this host
MAX_LINKS = 40  # as the kernel follows; source: path_resolution(7)


def _ids_of(status: os.stat_result) -> tuple[int, int]:
    """(uid, gid) of the owner, with the group of the file only if the owner is in it."""
    try:
        entry = pwd.getpwuid(status.st_uid)
    except KeyError:
        return status.st_uid, NOBODYS_GROUP
    is_member = status.st_gid in os.getgrouplist(entry.pw_name, entry.pw_gid)
    return status.st_uid, status.st_gid if is_member else entry.pw_gid


def owner_on_the_way(path: str) -> tuple[int, int]:
    """(uid, gid) of the user who decides what root finds by this path: of the first directory or link on the way that is not root's.

    Root's own where nobody else could put another file there, or a journal beside it. Raises PermissionError where several users could.
    """
    place, names, links = "/", os.path.abspath(path).split("/"), 0
    while names and os.path.isdir(place):
        name = names.pop(0)
        if name in ("", "."):
            continue
        status, found = os.stat(place), os.path.join(place, name)
        if status.st_uid:
            return _ids_of(status)
        if status.st_mode & (stat.S_IWOTH | stat.S_IWGRP):  # with an ACL, the bit of the group is set where any user may write
            if not names or not status.st_mode & stat.S_ISVTX:  # in a sticky one nobody replaces what is another's
                raise PermissionError(errno.EPERM, f"root uses no database below {place}, which others may write")
            with contextlib.suppress(FileNotFoundError):
                there = os.lstat(found)
                if there.st_uid:
                    return _ids_of(there)
        if os.path.islink(found):
            place, names, links = "/", os.path.join(place, os.readlink(found)).split("/") + names, links + 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        else:
            place = os.path.dirname(place) if name == ".." else found
    return 0, 0


def acting_as_owner_of(path: str) -> contextlib.AbstractContextManager[None]:
    """As root, use a file as the user who could put another one in its place; raises OSError."""
    if os.geteuid() != 0:
        return contextlib.nullcontext()
    return mailcloak.acting_as(*owner_on_the_way(path))


class _OwnersCursor(sqlite3.Cursor):
    """Of an OwnersConnection."""

    connection: OwnersConnection

    def execute(self, *arguments: Any) -> _OwnersCursor:
        with mailcloak.acting_as(*self.connection.owner):
            super().execute(*arguments)
        return self

    def executemany(self, *arguments: Any) -> _OwnersCursor:
        with mailcloak.acting_as(*self.connection.owner):
            super().executemany(*arguments)
        return self

    def executescript(self, *arguments: Any) -> _OwnersCursor:
        with mailcloak.acting_as(*self.connection.owner):
            super().executescript(*arguments)
        return self


class OwnersConnection(sqlite3.Connection):
    """One of root whose statements run as the user who owns the way to the file; it must be made as that user."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.owner = os.geteuid(), os.getegid()

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(_OwnersCursor)

    def execute(self, *arguments: Any) -> Any:
        return self.cursor().execute(*arguments)

    def executemany(self, *arguments: Any) -> Any:
        return self.cursor().executemany(*arguments)

    def executescript(self, *arguments: Any) -> Any:
        return self.cursor().executescript(*arguments)

    def backup(self, *arguments: Any, **options: Any) -> None:
        with mailcloak.acting_as(*self.owner):
            super().backup(*arguments, **options)

    def attach(self, uri: str, name: str) -> None:
        """ATTACH a file that only root may read."""
        self.execute("SELECT 1 FROM main.sqlite_master").fetchall()  # so that nothing is read of the own file now
        super().cursor().execute(f"ATTACH ? AS {name}", (uri,))

    def close(self) -> None:
        with mailcloak.acting_as(*self.owner):
            super().close()


def connect(path: str, busy_seconds: float) -> sqlite3.Connection:
    """As mailcloak.connect_database(), by the user who owns the way to the file; raises one of SQLITE_ERRORS."""
    try:
        owner = owner_on_the_way(path) if os.geteuid() == 0 else (0, 0)
    except OSError as exc:
        raise sqlite3.OperationalError(exc.strerror) from exc
    if not owner[0]:
        return mailcloak.connect_database(path, busy_seconds)
    with mailcloak.acting_as(*owner):
        return mailcloak.connect_database(path, busy_seconds, OwnersConnection)


def prepare(path: str, busy_seconds: float, *, create: bool = True) -> str:
    """As mailcloak.prepare_database(), by the user who owns the way to the file."""
    try:
        as_owner = acting_as_owner_of(path)
    except OSError as exc:
        raise mailcloak.DatabaseUnavailable(f"database: {path!r}: {exc.strerror}") from exc
    with as_owner:
        return mailcloak.prepare_database(path, busy_seconds, create=create)
