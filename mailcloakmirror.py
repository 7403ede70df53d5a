# mailcloakmirror: one database on several mail hosts. MIT licence, see LICENSE.
"""Keep the databases of several mail hosts equal: what db mirror and db promote of mailcloakctl run, and no other command loads.

  db mirror SOURCE                     makes the database equal to the file SOURCE; --watch stays, and does it at each change
  db mirror STATE --db FILE --publish  on the writer: the same for FILE, with a table origin that says whose rows these are
  db promote                           makes the writer of a host that follows another

One host is the writer: mailcloakctl changes its database there. All others follow it. Litestream, or anything else that copies a
file, brings the published file from host to host:

  writer     state.db --> shared.db ~~~ Litestream ~~~> shared.db --> state.db     follower

There are two files on each host since Litestream needs a file in WAL mode and writes pages behind SQLite's back, and Dovecot, which
keeps its connection, sees neither. What is brought into state.db is an ordinary transaction, which every reader sees.

SOURCE is opened again for each look: a connection that stays open does not see the pages that Litestream writes. It is checked as a
whole before a row of it counts: SQLite's quick_check, the schema version, the origin, and the digest of both. The digest finds what
SQLite cannot: a copy of which half the pages are of the next transaction, because its program was killed. Then only rows that differ are
written, in one transaction. A refused SOURCE changes nothing.

The origin (mailcloakcommon.Origin) says who the writer is, its epoch and the serial of its last change. Each promotion is a new epoch. A
writer that comes back has an older one, and is refused until somebody says --adopt.

Contents: the rows of a table, one look (bring the rows, follow, publish), staying, the verbs.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import secrets
import signal
import socket
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, Optional

import mailcloak
import mailcloakcommon as common
import mailcloakdata as data
import mailcloakowner

WATCH_SECONDS = 0.2  # between two looks at the times of SOURCE
RETRY_SECONDS = 2.0  # before a SOURCE that was refused is looked at again, though its times are the same
RESERVED_SERIALS = 86_400  # how many the writer's database notes ahead: as many seconds as until it is written again
RENEW_SECONDS = 10  # how often the writer says that its rows are still the same: silence is no stall then

ORIGIN = """
CREATE TABLE IF NOT EXISTS main.origin (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    role TEXT NOT NULL, writer TEXT NOT NULL, host TEXT NOT NULL, epoch INTEGER NOT NULL, serial INTEGER NOT NULL,
    published_at INTEGER NOT NULL, digest TEXT NOT NULL, file TEXT NOT NULL
)"""

# ---------------------------------------------------------------------------------------------------------------------------------
# The rows of a table
# A row without a key is nobody's, and is not brought.
# ---------------------------------------------------------------------------------------------------------------------------------


def digest_of(database: sqlite3.Connection, schema: str, origin: common.Origin) -> str:
    """A digest of all rows and of whose they are, which is the same wherever the same rows are."""
    digest = hashlib.blake2b(repr((origin.writer, origin.host, origin.epoch, origin.serial)).encode(), digest_size=16)
    for table in sorted(data.read_tables()):
        row = " || ".join(f"quote({column})" for column in table.columns)
        select = (
            f"SELECT CAST({row} AS BLOB) FROM {schema}.{table.name} WHERE {data.has_key(table)} ORDER BY {', '.join(table.keys)}"  # noqa: S608
        )
        rows = data.rows_of(database, select)
        digest.update(table.name.encode())
        while batch := list(itertools.islice(rows, data.BATCH_ROWS)):
            digest.update(b"".join(row[0] for row in batch))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------------------
# One look
# ---------------------------------------------------------------------------------------------------------------------------------


def why_refused(ours: Optional[common.Origin], theirs: Optional[common.Origin], *, has_rows: bool) -> str:
    """Why a database with the origin ours does not follow a SOURCE with the origin theirs, "" if it does; --adopt follows it anyway.

    has_rows: does the database have any?
    """
    if theirs is None or not theirs.digest:  # nothing tells whether it is whole, or older than what is here
        return "no writer has published it with db mirror --publish" if ours or has_rows else ""
    if ours is None:
        return "this database has rows of its own, which would be lost" if has_rows else ""
    if ours.role == "writer":
        itself = theirs.writer == ours.writer
        return "these are rows of this host itself, which is the writer" if itself else "this host is the writer itself"
    if theirs.epoch < ours.epoch:
        return f"{theirs.host} is no longer the writer, {ours.host} is"
    if theirs.epoch == ours.epoch and theirs.writer != ours.writer:
        return f"both {theirs.host} and {ours.host} say that they are the writer"
    if theirs.epoch == ours.epoch and theirs.serial < ours.serial:
        return "it is older than what is here"
    return ""


def is_there(path: str) -> bool:
    """Is it anything but a place for a new database, or a file that was emptied?"""
    return os.path.lexists(path) and not (os.path.isfile(path) and os.stat(path).st_size == 0)


@contextlib.contextmanager
def open_target(path: str, *, wal: bool) -> Iterator[sqlite3.Connection]:
    """The database that is to be made equal. One that is missing is put there when it is whole: nobody finds it without its rows."""
    if is_there(path):
        with contextlib.closing(common.open_database(path, create=False)) as database:
            if wal:
                common.patiently(lambda: database.execute("PRAGMA journal_mode = WAL"))
            database.execute("PRAGMA foreign_keys = OFF")  # rows are brought as they are, in any order
            database.execute("PRAGMA cache_spill = OFF")  # as in mailcloakdata.write()
            yield database
        return
    with contextlib.closing(sqlite3.connect(":memory:", uri=True, isolation_level=None)) as database:
        database.executescript(f"{mailcloak.SCHEMA}; PRAGMA user_version = {mailcloak.SCHEMA_VERSION}")
        yield database
        if os.path.lexists(path):  # somebody has emptied it
            with contextlib.closing(mailcloakowner.connect(path, common.INTERRUPT_SECONDS)) as empty:
                common.patiently(lambda: database.backup(empty))
        else:
            data.make_database(database, path, wal=wal)


@contextlib.contextmanager
def attached(database: sqlite3.Connection, source: str) -> Iterator[None]:
    """SOURCE as the schema "source", which can only be read; raises Refused."""
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            raise refused(source, "it is not a file")
        if status.st_size == 0:
            raise refused(source, "it is empty")
        # for writing: only then can SQLite roll back the journal of a killed writer, and make the -shm file of WAL mode
        first = mailcloakowner.connect(source, common.INTERRUPT_SECONDS)
    except OSError as exc:
        raise refused(source, exc.strerror or str(exc)) from exc
    except mailcloak.SQLITE_ERRORS as exc:
        raise refused(source, mailcloak.describe_sqlite(exc)) from exc
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(first))
        try:
            stack.enter_context(data.reading(first))  # as a writer, see there
            first.execute("SELECT count(*) FROM sqlite_master").fetchall()
            data.attach(database, source, "source")
        except mailcloak.SQLITE_ERRORS as exc:
            raise refused(source, mailcloak.describe_sqlite(exc)) from exc
        try:
            yield
        finally:
            with contextlib.suppress(*mailcloak.SQLITE_ERRORS):  # a question that was interrupted still holds it
                database.execute("DETACH source")  # before first: who closes last in WAL mode must be able to write


def refused(source: str, why: str, remedy: str = "") -> common.Refused:
    """SOURCE is refused, and nothing was changed."""
    return common.Refused(f"db: mirror: {source!r} is refused: {why}", remedy)


def check_source(database: sqlite3.Connection, source: str, origin: Optional[common.Origin]) -> None:
    """Raise Refused unless SOURCE is whole, and of our schema. In a transaction that has begun."""
    try:
        damage = str(database.execute("PRAGMA source.quick_check(1)").fetchone()[0])
        if damage != "ok":
            raise refused(source, f"it is damaged: {damage}")
        version = database.execute("PRAGMA source.user_version").fetchone()[0]
        if version != mailcloak.SCHEMA_VERSION:
            why = f"it has schema version {version}, this mailcloak has {mailcloak.SCHEMA_VERSION}"
            raise refused(source, why, "install the same version on both hosts")
        for name, columns, _ in sorted(data.read_tables()):
            is_table = "SELECT 1 FROM source.sqlite_master WHERE name = ? AND type = 'table' AND rootpage > 0"
            if not database.execute(is_table, (name,)).fetchone():  # a view, whose rows may have no end, or a virtual table
                raise refused(source, f"it has no table {name}")
            found = {row[1] for row in database.execute(f"PRAGMA source.table_info({name})")}
            if found != set(columns):
                raise refused(source, f"its table {name} has other columns")
        if origin and origin.digest and digest_of(database, "source", origin) != origin.digest:
            raise refused(source, "its rows are not those that the writer has published: it is damaged, or half of a change")
    except mailcloak.SQLITE_ERRORS as exc:
        raise refused(source, mailcloak.describe_sqlite(exc)) from exc


def make_equal(database: sqlite3.Connection) -> int:
    """Write the rows of the schema "source" that differ; how many these were. In a transaction that has begun."""
    changed = 0
    for table in data.read_tables():
        rows = f"SELECT {', '.join(table.columns)} FROM source.{table.name} WHERE {data.has_key(table)}"  # noqa: S608
        changed += data.copy_rows(database, table, rows)
        counts = f"SELECT (SELECT count(*) FROM main.{table.name}), (SELECT count(*) FROM ({rows}))"  # noqa: S608
        ours, theirs = database.execute(counts).fetchone()
        if ours != theirs:  # all of SOURCE are here now
            changed += data.delete_rows(database, table, "source")
    return changed


def has_rows(database: sqlite3.Connection) -> bool:
    """Are any of our own there?"""
    names = [table.name for table in data.read_tables()]
    return any(database.execute(f"SELECT 1 FROM main.{name} LIMIT 1").fetchone() for name in names)  # noqa: S608


def write_origin(database: sqlite3.Connection, origin: common.Origin) -> None:
    """Say whose rows these are, in the transaction that has begun."""
    database.execute(ORIGIN)
    names = ", ".join(common.Origin._fields)
    database.execute(f"REPLACE INTO main.origin (id, {names}) VALUES (1{', ?' * len(origin)})", origin)  # noqa: S608


def follow(path: str, source: str, *, thorough: bool, adopt: bool = False) -> int:
    """Make the database equal to SOURCE; how many rows were changed. Raises Refused.

    thorough: also where the origin says that these are the rows that were brought last.
    """
    with open_target(path, wal=False) as database, attached(database, source), common.transaction(database, of_mirror=True):
        ours = common.find_origin(database)
        try:
            theirs = common.find_origin(database, "source")
        except mailcloak.SQLITE_ERRORS as exc:
            raise refused(source, mailcloak.describe_sqlite(exc)) from exc
        why = why_refused(ours, theirs, has_rows=ours is None and has_rows(database))
        if why and not adopt:
            raise refused(source, why, "if it is the right one, db mirror --adopt takes it")
        changed = 0
        if thorough or not is_same_state(ours, theirs):
            check_source(database, source, theirs)
            changed = make_equal(database)
        if theirs is None and ours:
            database.execute("DROP TABLE main.origin")
        elif theirs and (now := theirs._replace(role="follower", file=source)) != ours:
            write_origin(database, now)
        if changed:
            data.prepare_commit(database)
    if changed:
        common.note_change("db: mirror", source, rows=changed, host=theirs and theirs.host, serial=theirs and theirs.serial)
    return changed


def follow_again(path: str, source: str) -> int:
    """Put a new database in place of a damaged one, if SOURCE is whole; that one stays beside it. How many rows there are."""
    new, kept = f"{path}.again-{os.getpid()}", f"{path}.damaged"
    try:
        changed = follow(new, source, thorough=True)
        with mailcloakowner.acting_as_owner_of(path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(kept)
            os.link(path, kept)
            os.replace(new, path)
    finally:
        with contextlib.suppress(FileNotFoundError), mailcloakowner.acting_as_owner_of(path):
            os.unlink(new)
    common.say(f"db: mirror: {path} was damaged, and is made again; the damaged one is {kept}")
    return changed


def is_damaged(path: str) -> bool:
    """Does SQLite find damage in it? One that it does not take for a database may be any file, and counts as none."""
    try:
        with contextlib.closing(mailcloakowner.connect(path, common.INTERRUPT_SECONDS)) as database:
            return str(database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok"
    except mailcloak.SQLITE_ERRORS as exc:
        return "malformed" in mailcloak.describe_sqlite(exc)


def is_same_state(ours: Optional[common.Origin], theirs: Optional[common.Origin]) -> bool:
    """Are these surely the same rows? Of a file that nobody has published, nobody knows."""

    def state(origin: common.Origin) -> tuple[Any, ...]:
        return origin.writer, origin.epoch, origin.serial, origin.digest

    return ours is not None and theirs is not None and bool(theirs.digest) and state(ours) == state(theirs)


def publish(path: str, source: str, *, thorough: bool) -> int:
    """Make the file that others follow equal to the writer's database SOURCE; how many rows were changed. Raises Refused."""
    own, serial = find_own(source, path, check_published(path))
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(open_target(path, wal=True))
        with data.reading(database):  # wait for its turn here while mailcloakctl may still write to SOURCE
            pass
        stack.enter_context(attached(database, source))
        stack.enter_context(common.transaction(database, of_mirror=True))
        last = common.find_origin(database)
        is_ours = last is not None and (last.writer, last.epoch) == (own.writer, own.epoch)
        if last and not is_ours and last.epoch >= own.epoch:
            remedy = f"remove {path} if it is an old copy; if {last.host} is the writer now, let this host follow it"
            raise common.Refused(f"db: mirror: {path!r} has rows of the writer {last.host}, nothing was changed", remedy)
        changed = 0
        if thorough or not is_ours:
            check_source(database, source, None)
            changed = make_equal(database)
        now = int(time.time())
        if changed or not is_ours or not last:
            new = own._replace(serial=max(serial, last.serial + 1 if last else 0), published_at=now, file="")
            write_origin(database, new._replace(digest=digest_of(database, "main", new)))
        elif not 0 <= now - last.published_at < RENEW_SECONDS:
            write_origin(database, last._replace(published_at=now))
    return changed


def check_published(path: str) -> Optional[common.Origin]:
    """The origin of the file; raises Refused where it has rows that were not published, such as those of a host's own database."""
    if not is_there(path):
        return None
    with contextlib.closing(common.open_database(path, create=False)) as database:
        last = common.patiently(lambda: common.find_origin(database))
        if has_rows(database) if last is None else not is_published(last):
            remedy = "say db mirror DATABASE --db FILE --publish with a new FILE, or with one that was published"
            raise common.Refused(f"db: mirror: {path!r} has rows that were not published, nothing was changed", remedy)
    return last


def find_own(state: str, published: str, last: Optional[common.Origin]) -> tuple[common.Origin, int]:
    """The origin of the writer's database, made at the first use, and the serial of the next change.

    last: the origin of what is published. Where that was lost, the serial is beyond each one that was published, since the one in
    the database always is: also after a time in which the clock was ahead. Raises Refused where it is a follower's, or a published file.
    """
    with contextlib.closing(common.open_database(state, create=False)) as database:
        own = common.patiently(lambda: common.find_origin(database))
        if own and own.role != "writer":
            remedy = "mailcloakctl db promote makes this host the writer"
            raise common.Refused(f"db: mirror: {state!r} follows the database of {own.host}, nothing was published", remedy)
        if own and is_published(own):
            remedy = "say db mirror DATABASE --db FILE --publish"
            raise common.Refused(f"db: mirror: {state!r} is no database of a host, but was published, nothing was changed", remedy)
        before, own = own, own or new_writer(epoch=1, serial=0)
        known = last.serial if last and (last.writer, last.epoch) == (own.writer, own.epoch) else own.serial
        serial = max(known + 1, int(time.time()))
        own = own._replace(file=published, serial=own.serial if serial <= own.serial else serial + RESERVED_SERIALS)
        if own != before:
            with common.transaction(database, of_mirror=True):
                write_origin(database, own)
        return own, serial


def is_published(origin: common.Origin) -> bool:
    """Is it that of a file for others to follow, and not of a host's own database?"""
    return origin.role == "writer" and bool(origin.digest)


def new_writer(*, epoch: int, serial: int) -> common.Origin:
    """The origin of this host as a writer that nobody knows yet."""
    return common.Origin("writer", secrets.token_hex(8), socket.gethostname(), epoch, serial, int(time.time()), "", "")


# ---------------------------------------------------------------------------------------------------------------------------------
# Staying
# ---------------------------------------------------------------------------------------------------------------------------------


def state_of(source: str) -> tuple[Any, ...]:
    """What changes when SOURCE does: times, sizes and inodes, of Litestream's note of its transaction too, and SQLite's header.

    To be called while this process has no connection to SOURCE: closing a file ends the locks that the process has on it.
    """
    found: list[Any] = []
    source = os.path.realpath(source)  # as SQLite does, for the file of WAL mode
    for name in (source, f"{source}-wal", f"{source}-txid"):
        try:
            status = os.stat(name)
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    with contextlib.suppress(OSError), open(source, "rb", opener=open_at_once) as file:
        found.append(file.read(100))  # has the change counter: two commits may have one time
    return tuple(found)


def open_at_once(path: str, flags: int) -> int:
    """An opener that does not wait for a FIFO, which may have come in place of the file."""
    return os.open(path, flags | os.O_NONBLOCK)


def watch(source: str, look: Callable[[bool], int], name: str, *, renew: bool) -> None:
    """Look whenever SOURCE has changed, and say it when it is refused for another reason, until SIGTERM or SIGINT.

    look takes whether all rows are to be compared. renew: also look when RENEW_SECONDS are over. Without it, also look when another
    program has changed or removed the database with this name, which only this one writes; Litestream writes to what is published.
    """
    is_ended = False

    def end(*_: object) -> None:
        nonlocal is_ended
        is_ended = True  # also where what ends then fails in another way
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    reason: Optional[str] = None  # of the last refusal, "" where there was none
    seen: tuple[Any, ...] = ()
    left: tuple[Any, ...] = ()  # the state of the database after the last look
    due = 0.0
    with contextlib.suppress(KeyboardInterrupt):
        while not is_ended:
            signal.pthread_sigmask(
                signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
            )  # see mailcloakcommon.commit()
            state = state_of(source)
            is_touched = not renew and state_of(name) != left
            if state != seen or is_touched or time.monotonic() >= due:
                thorough = reason != "" or is_touched or (renew and state != seen)
                before, reason = reason, try_to_look(look, thorough=thorough)
                seen, left = state, () if renew else state_of(name)  # before anything is said, which may take time
                if reason != before and not is_ended:
                    common.say(f"{reason}; tried again until it can" if reason else f"db: mirror: {name} is as {source}")
                due = time.monotonic() + (RETRY_SECONDS if reason else RENEW_SECONDS if renew else float("inf"))
            time.sleep(WATCH_SECONDS)


def try_to_look(look: Callable[[bool], int], *, thorough: bool) -> str:
    """Why nothing could be brought, "" if it could."""
    try:
        look(thorough)
    except (mailcloak.MailcloakError, *mailcloak.SQLITE_ERRORS, OSError) as exc:
        return str(exc) if isinstance(exc, (mailcloak.MailcloakError, OSError)) else f"db: mirror: {mailcloak.describe_sqlite(exc)}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------------------
# The verbs
# ---------------------------------------------------------------------------------------------------------------------------------


def mirror(context: common.Context) -> None:
    """Make the database equal to another; again and again with --watch."""
    options, path, source = context.options, context.path, os.path.abspath(context.options.source)
    both_exist = os.path.exists(path) and os.path.exists(source)
    if os.path.samefile(path, source) if both_exist else os.path.realpath(path) == os.path.realpath(source):
        raise common.Refused(f"db: mirror: {source!r} is the database itself, name another file")

    def look(thorough: bool) -> int:
        if options.publish:
            return publish(path, source, thorough=thorough)
        try:
            changed = follow(path, source, thorough=thorough, adopt=options.adopt)
        except (common.Refused, *mailcloak.SQLITE_ERRORS) as exc:
            if not options.watch or mailcloak.sqlite_fault(exc) != "damaged" or not is_damaged(path):
                raise
            changed = follow_again(path, source)
        options.adopt = False  # with --watch: this one, and no later one
        return changed

    if options.watch:
        watch(source, look, path, renew=options.publish)
        return
    changed = look(True)
    text = f"{path} is as {source}, {changed} rows changed"
    data.tell_numbers(context, context.database, text, changed=bool(changed))


def promote(context: common.Context) -> None:
    """Make this host, which follows another, the writer; the next epoch begins."""
    database = context.database
    with common.transaction(database, of_mirror=True):
        ours = common.find_origin(database)
        if ours is None:
            raise common.Refused("db: promote: this database follows none", "db mirror --publish makes this host a writer")
        if ours.role == "follower":
            write_origin(database, new := new_writer(epoch=ours.epoch + 1, serial=ours.serial))
    if ours.role == "writer":
        common.answer(context, [], "db: this host is the writer already")
        return
    common.note_change("db: promote", new.host, epoch=new.epoch, before=ours.host)
    common.answer(context, [context.path], f"db: this host is the writer now, in place of {ours.host}")
    common.say("db: next, stop what follows here, publish, and let the other hosts follow this one: README, Several mail hosts")
