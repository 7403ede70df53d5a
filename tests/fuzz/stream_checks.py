"""What must hold for whatever bytes reach a parser. The fuzzer asks it of bytes it finds, test_fuzz_corpus.py of those kept in corpus/.

An input is a stream in pieces, each ended by one of six bytes that UTF-8 never holds: 0xf8 ends a piece as it stands, 0xf9 to 0xfd end
one that comes 4, 16, 64, 256 or 1024 times, in four pieces. So a short input can be a long stream, and its file still reads as what a
client would send.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from typing import Any, NamedTuple, Optional

import mailcloak

MAX_STREAM_BYTES = 64 * 1024  # four times the longest request; longer streams only cost time
MAX_DECIDED = 8  # different requests of one stream that are answered
PIECE_ENDS = {0xF8: (1, 1), 0xF9: (4, 1), 0xFA: (4, 4), 0xFB: (4, 16), 0xFC: (4, 64), 0xFD: (4, 256)}  # pieces, copies in each

POLICY = mailcloak.PolicyConfig(domain=frozenset({"d1.test", "d2.test"}), recipient_delimiter="+-")
POLICIES = (
    POLICY,
    replace(POLICY, mailbox_domain="mailbox.test", unauthenticated_local_sender="warn", foreign_sender="dunno"),
    replace(POLICY, recipient_delimiter="", keycloak_failure_mode="dunno"),
)

POLICY_ANSWER = re.compile(rb"action=(DUNNO|(550|553|451) [45]\.\d\.\d [A-Za-z /]+)\n\n")
_MAILBOX = r'(alice|bob)[^\s\x00-\x1f\x7f-\x9f,:;"()<>\[\]\\@]*@(d1|d2|mailbox)\.test'
SOCKETMAP_ANSWER = re.compile(rf"OK {_MAILBOX}(,{_MAILBOX})*(,jo@elsewhere\.test)?|NOTFOUND |TEMP [a-z ]+")


class Outcome(NamedTuple):
    """What a stream gave: its requests, and the text of the protocol error that ended them, None if there was none."""

    requests: list[Any]
    error: Optional[str]


def to_pieces(data: bytes) -> list[bytes]:
    """The pieces in which an input is fed; the first that would make the stream longer than MAX_STREAM_BYTES ends it."""
    pieces: list[bytes] = []
    room, start = MAX_STREAM_BYTES, 0
    for end, byte in enumerate(data + b"\xf8"):
        if byte in PIECE_ENDS:
            count, times = PIECE_ENDS[byte]
            piece = data[start:end] * times
            room -= len(piece) * count
            if room < 0:
                break
            pieces += [piece] * count
            start = end + 1
    return pieces


def drain(stream: Any) -> Outcome:
    """The requests that a stream has ready; whatever is raised but ProtocolError passes through."""
    requests = []
    try:
        while True:
            request = stream.next_request()
            if request is None:
                return Outcome(requests, None)
            requests.append(request)
    except mailcloak.ProtocolError as exc:
        return Outcome(requests, str(exc))


def check(stream_class: Any, data: bytes) -> None:
    """Raise unless the input is read the same whole and in pieces, bounded, and answered as the protocol demands."""
    pieces = to_pieces(data)
    in_pieces = feed(stream_class, pieces)
    whole = feed(stream_class, [b"".join(pieces)])
    assert in_pieces == whole, f"in pieces {in_pieces}, whole {whole}"
    if whole.error is not None:
        assert whole.error.isprintable() and '"' not in whole.error, f"the log would get {whole.error!r} in quotes"
    for request in list(dict.fromkeys(whole.requests))[:MAX_DECIDED]:
        check_request(stream_class, request)


def feed(stream_class: Any, pieces: list[bytes]) -> Outcome:
    """What the pieces give, up to the first error as in the daemon, while the stream never keeps more than one request."""
    stream, requests = stream_class(), []
    for piece in pieces:
        stream.feed(piece)
        outcome = drain(stream)
        requests += outcome.requests
        if outcome.error is not None:
            return Outcome(requests, outcome.error)
        kept, limit = kept_bytes(stream), max_kept_bytes(stream_class)
        assert kept <= limit, f"{kept} bytes kept, {limit} are the limit"
    return Outcome(requests, None)


def kept_bytes(stream: Any) -> int:
    """How much a stream holds, whatever its fields are called."""
    return len(pickle.dumps(stream)) - len(pickle.dumps(type(stream)()))


def max_kept_bytes(stream_class: Any) -> int:
    """The longest request, and some bytes for the lengths and numbers beside it."""
    if issubclass(stream_class, mailcloak.PolicyStream):
        return mailcloak.MAX_POLICY_REQUEST_BYTES + 64
    return len(mailcloak.encode_netstring(b"x" * mailcloak.MAX_SOCKETMAP_QUERY_BYTES)) + 64


def check_request(stream_class: Any, request: Any) -> None:
    """Raise unless every value of the request is harmless in the log and its answer is one answer, whatever the facts are."""
    for value in request:
        escaped = mailcloak.escape_for_log(value)
        assert escaped.isprintable(), f"{escaped!r} cannot be printed"
        assert not set(escaped) & set(' <>"'), f"{escaped!r} ends a value of the log early"
    for policy in POLICIES:
        for facts in WORLDS:
            encoded = stream_class.encode(answer(request, policy, facts))
            assert is_answer(stream_class, encoded), f"{encoded!r} answers {request}"


def answer(request: Any, policy: mailcloak.PolicyConfig, facts: mailcloak.Facts) -> mailcloak.Action:
    """The decision on a request of either protocol; a query is taken for one of the alias map."""
    if isinstance(request, mailcloak.SocketmapQuery):
        return mailcloak.decide_alias(request.key, policy, facts)
    return mailcloak.decide_policy(request, policy, facts)


def is_answer(stream_class: Any, encoded: bytes) -> bool:
    """Is this one whole answer, of words that the protocol has?"""
    if issubclass(stream_class, mailcloak.PolicyStream):
        return POLICY_ANSWER.fullmatch(encoded) is not None
    payload = netstring_payload(encoded)
    return payload is not None and SOCKETMAP_ANSWER.fullmatch(payload) is not None


def netstring_payload(encoded: bytes) -> Optional[str]:
    """The text in a netstring; None if the bytes are not exactly one."""
    digits, _, rest = encoded.partition(b":")
    if not re.fullmatch(rb"0|[1-9][0-9]*", digits) or len(rest) != int(digits) + 1 or not rest.endswith(b","):
        return None
    return rest[:-1].decode()


class PlainFacts(mailcloak.Facts):
    """The same values for every address and every login; an exception's class is raised."""

    def __init__(self, alias: Any, app: Any, holders: Any, login: Any) -> None:
        self._alias, self._app, self._holders, self._login = alias, app, holders, login

    def find_alias(self, address: mailcloak.Address) -> Any:
        return _value(self._alias, address)

    def find_app(self, app_id: str, sender: mailcloak.Address) -> Any:
        return _value(self._app)

    def find_holders(self, address: mailcloak.Address) -> Any:
        return _value(self._holders, address)

    def has_left(self, username: str) -> Any:
        return not _value(self._holders)

    def find_login(self, sasl_username: str) -> Any:
        return _value(self._login)

    def find_user(self, username: str) -> Any:
        return _value(self._login)


class UntaggedFacts(PlainFacts):
    """As above, but what has an extension is no alias: it is cut off, and comes back in the answer."""

    def find_alias(self, address: mailcloak.Address) -> Any:
        alias = super().find_alias(address)
        return None if set(address.local_part) & set("+-") else alias


def _value(value: Any, address: Optional[mailcloak.Address] = None) -> Any:
    if address is not None:
        assert address.is_plain, f"{address} is asked for, which neither SQLite nor Keycloak can take"
        address.text.encode()
    if isinstance(value, type):
        raise value("broken")
    return value


HERS = mailcloak.Alias(("alice",), True)
THEIRS = mailcloak.Alias(("alice", "bob"), True, ("jo@elsewhere.test",))
ALICE = mailcloak.Login("alice", "enabled")
APP = mailcloak.App("enabled", True, "alice")
WORLDS = (
    PlainFacts(HERS, None, (), ALICE),
    UntaggedFacts(HERS, APP, (), ALICE),
    UntaggedFacts(THEIRS, None, (mailcloak.User("alice", "alice@d1.test", True),), ALICE),
    PlainFacts(None, None, (mailcloak.User("alice", "alice@d1.test", True),), ALICE),
    PlainFacts(None, None, (), mailcloak.Login("", "missing")),
    PlainFacts(None, mailcloak.DatabaseUnavailable, mailcloak.DirectoryUnavailable, mailcloak.DirectoryUnavailable),
    PlainFacts(mailcloak.DatabaseUnavailable, None, (), ALICE),
)
