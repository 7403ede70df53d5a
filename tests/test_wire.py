"""The two protocols: whole, in pieces, pipelined, malformed; on the parsers and on a running daemon."""

from __future__ import annotations

import pytest
from fuzz.stream_checks import drain
from hypothesis import given, settings
from hypothesis import strategies as st

import mailcloak

FULL_REQUEST = b"""request=smtpd_access_policy
protocol_state=RCPT
protocol_name=ESMTP
helo_name=client.elsewhere.test
queue_id=8045F2AB23
sender=someone@elsewhere.test
recipient=alice@d1.test
recipient_count=0
client_address=192.0.2.7
client_name=client.elsewhere.test
reverse_client_name=client.elsewhere.test
instance=123.456.7
sasl_method=
sasl_username=
sasl_sender=
size=12345
ccert_subject=
ccert_issuer=
ccert_fingerprint=
ccert_pubkey_fingerprint=
encryption_protocol=TLSv1.3
encryption_cipher=TLS_AES_256_GCM_SHA384
encryption_keysize=256
etrn_domain=
stress=
client_port=40000
policy_context=
server_address=192.0.2.1
server_port=25

"""


def netstring(payload):
    return b"%d:%s," % (len(payload), payload)


def feed_in_pieces(stream_class, data, cuts):
    stream, requests, error = stream_class(), [], None
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in zip(edges, edges[1:]):
        stream.feed(data[start:end])
        more, error = drain(stream)
        requests += more
        if error:
            break
    return requests, error


# ---- parsers


def test_full_request_of_postfix_is_read():
    stream = mailcloak.PolicyStream()
    stream.feed(FULL_REQUEST)
    assert stream.next_request() == mailcloak.PolicyRequest(
        protocol_state="RCPT",
        recipient="alice@d1.test",
        sender="someone@elsewhere.test",
        text="\n" + FULL_REQUEST[:-1].decode(),
    )
    assert stream.next_request() is None


attribute_text = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=30)
policy_streams = st.lists(
    st.fixed_dictionaries({"recipient": attribute_text, "sender": attribute_text}, optional={"x" * 9: attribute_text}),
    min_size=1,
    max_size=4,
).map(
    lambda all_: [
        b"request=smtpd_access_policy\n" + "".join(f"{k}={v}\n" for k, v in each.items()).encode() + b"\n" for each in all_
    ]
)
socketmap_streams = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(str.encode), min_size=1, max_size=5
).map(lambda all_: [netstring(each) for each in all_])
cuts = st.lists(st.integers(0, 10_000), max_size=12)


@given(policy_streams, cuts)
def test_policy_stream_split_anywhere_gives_the_same_requests(requests, cuts):
    whole = feed_in_pieces(mailcloak.PolicyStream, b"".join(requests), [])
    assert feed_in_pieces(mailcloak.PolicyStream, b"".join(requests), cuts) == whole
    assert (len(whole[0]), whole[1]) == (len(requests), None)


@given(socketmap_streams, cuts)
def test_socketmap_stream_split_anywhere_gives_the_same_queries(queries, cuts):
    whole = feed_in_pieces(mailcloak.SocketmapStream, b"".join(queries), [])
    assert feed_in_pieces(mailcloak.SocketmapStream, b"".join(queries), cuts) == whole
    assert (len(whole[0]), whole[1]) == (len(queries), None)


@settings(max_examples=500)
@given(st.sampled_from([mailcloak.PolicyStream, mailcloak.SocketmapStream]), st.binary(max_size=200), cuts)
def test_no_bytes_make_a_parser_raise_anything_but_a_protocol_error(stream_class, data, cuts):
    requests, error = feed_in_pieces(stream_class, data, cuts)
    whole_requests, whole_error = feed_in_pieces(stream_class, data, [])
    assert (requests, bool(error)) == (whole_requests, bool(whole_error))


@given(st.binary(max_size=300))
def test_netstring_of_any_bytes_is_read_back(payload):
    stream = mailcloak.SocketmapStream()
    stream.feed(mailcloak.encode_netstring(payload))
    query = stream.next_request()
    name, space, key = payload.decode("utf-8", "surrogateescape").partition(" ")
    assert query == (name, key if space else "")


# ---- a running daemon

BAD_POLICY = [
    pytest.param(b"\n", id="empty-request"),
    pytest.param(b"recipient=a@b\n\n", id="no-request-attribute"),
    pytest.param(b"request=\n\n", id="empty-request-attribute"),
    pytest.param(b"request=junk_filter\nrecipient=alice@d1.test\n\n", id="other-request"),
    pytest.param(b"request=smtpd_access_policy\nrecipient=" + b"a" * 20_000, id="over-long-unfinished"),
    pytest.param(b"request=smtpd_access_policy\nrecipient=" + b"a" * 17_000 + b"\n\n", id="over-long-whole"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\n\n", id="http"),
    pytest.param(b"21:alias info@d1.test,\n\n", id="socketmap-query"),
    pytest.param(bytes(range(256)) + b"\n\n", id="all-bytes"),
]
BAD_SOCKETMAP = [
    pytest.param(b"x", id="no-digit"),
    pytest.param(b":", id="no-length"),
    pytest.param(b"-1:,", id="negative"),
    pytest.param(b"+5:alias,", id="plus"),
    pytest.param(b"05:alias,", id="leading-zero"),
    pytest.param(b"999999", id="six-digits"),
    pytest.param(b"10001:" + b"a" * 10_001 + b",", id="over-long"),
    pytest.param(b"99999:", id="over-long-announced"),
    pytest.param(b"5:aliasX", id="no-comma"),
    pytest.param(b"4:alias info@d1.test,", id="length-too-small"),
    pytest.param(b"request=smtpd_access_policy\n\n", id="policy-request"),
    pytest.param(b"\x00" * 50, id="nul"),
    pytest.param("٣:abc,".encode(), id="other-digits"),
]


@pytest.mark.parametrize("size", [1, 7, 100, 10_000], ids=lambda size: f"pieces-of-{size}")
def test_policy_requests_in_pieces_are_answered(static_daemon, size):
    client = static_daemon.policy()
    for _ in range(3):
        for start in range(0, len(FULL_REQUEST), size):
            client.send_bytes(FULL_REQUEST[start : start + size])
        assert client.receive() == "DUNNO"


def test_pipelined_policy_requests_are_answered_in_order(static_daemon):
    client = static_daemon.policy()
    client.send_bytes(FULL_REQUEST + FULL_REQUEST.replace(b"alice@", b"stranger@") + FULL_REQUEST)
    assert [client.receive() for _ in range(3)] == ["DUNNO", "550 5.1.1 No such user", "DUNNO"]


def test_pipelined_socketmap_queries_are_answered_in_order(static_daemon):
    static_daemon.ctl("aliases", "add", "info@d1.test", "alice")
    client = static_daemon.socketmap()
    info, stranger = netstring(b"alias info@d1.test"), netstring(b"alias stranger@d1.test")
    client.send_bytes(info[:10])
    client.send_bytes(info[10:] + stranger + info)
    assert [client.receive() for _ in range(3)] == ["OK alice@d1.test", "NOTFOUND ", "OK alice@d1.test"]


@pytest.mark.parametrize("data", BAD_POLICY)
def test_bad_policy_request_is_logged_and_closes_its_connection_alone(static_daemon, data):
    other, client = static_daemon.policy(), static_daemon.policy()
    assert other.ask(recipient="alice@d1.test") == "DUNNO"
    client.send_bytes(FULL_REQUEST + data)
    assert client.receive() == "DUNNO"
    assert client.receive() is None
    static_daemon.wait_for_log("warning policy: bad request")
    assert other.ask(recipient="stranger@d1.test") == "550 5.1.1 No such user"
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert "Traceback" not in static_daemon.log()


@pytest.mark.parametrize("data", BAD_SOCKETMAP)
def test_bad_socketmap_query_is_logged_and_closes_its_connection_alone(static_daemon, data):
    other, client = static_daemon.socketmap(), static_daemon.socketmap()
    client.send_bytes(netstring(b"alias xxx@d1.test") + data)
    assert client.receive() == "NOTFOUND "
    assert client.receive() is None
    static_daemon.wait_for_log("warning socketmap: bad request")
    assert other.ask("alias xxx@d1.test") == "NOTFOUND "
    assert "Traceback" not in static_daemon.log()


def test_largest_requests_allowed_are_answered(static_daemon):
    client = static_daemon.policy()
    padding = b"x" * (mailcloak.MAX_POLICY_REQUEST_BYTES - len(FULL_REQUEST) - len(b"padding=\n"))
    client.send_bytes(b"padding=" + padding + b"\n" + FULL_REQUEST)
    assert client.receive() == "DUNNO"
    client.send_bytes(b"padding=x" + padding + b"\n" + FULL_REQUEST)
    assert client.receive() is None
    client = static_daemon.socketmap()
    assert client.ask("alias " + "x" * (mailcloak.MAX_SOCKETMAP_QUERY_BYTES - 6)) == "NOTFOUND "


def test_last_attribute_of_a_name_counts_and_unknown_ones_are_ignored(static_daemon):
    client = static_daemon.policy()
    client.send_bytes(
        b"request=smtpd_access_policy\nprotocol_state=RCPT\nfuture=x=y\nrecipient=a=b@d1.test\nrecipient=alice@d1.test\n"
        b"sasl_recipient=stranger@d1.test\nrecipient\n recipient=stranger@d1.test\n\n"
    )
    assert client.receive() == "DUNNO"


def test_connection_closed_in_the_middle_of_a_request_leaves_the_daemon_well(static_daemon):
    for data in (FULL_REQUEST[:100], FULL_REQUEST + FULL_REQUEST[:50], b""):
        client = static_daemon.policy()
        client.send_bytes(data)
        client.close()
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert "Traceback" not in static_daemon.log()


def test_idle_connections_hold_nobody_up(static_daemon):
    idle = [static_daemon.policy() for _ in range(200)] + [static_daemon.socketmap() for _ in range(50)]
    idle[0].send_bytes(b"request=smtpd_access_policy\nrecip")
    assert static_daemon.ask(recipient="alice@d1.test") == "DUNNO"
    assert idle[-1].ask("alias x@d1.test") == "NOTFOUND "
    assert idle[100].ask(recipient="alice@d1.test") == "DUNNO"


def test_client_bytes_cannot_forge_a_log_line(static_daemon):
    client = static_daemon.policy()
    client.ask(recipient="x\r\x1b[31m> reason=ok elapsed_ms=1 \u2028\udcff@d1.test", sender='"<>"@elsewhere.test')
    static_daemon.wait_for_log("unknown-recipient")
    line = next(line for line in static_daemon.log().split("\n") if "unknown-recipient" in line)
    assert r"recipient=<x\r\x1b[31m\x3e\x20reason=ok\x20elapsed_ms=1\x20\u2028\udcff@d1.test>" in line
    assert r"sender=<\x22\x3c\x3e\x22@elsewhere.test>" in line
    assert line.count("reason=") == 2


def test_decision_is_logged_on_one_line_with_its_fields(static_daemon):
    static_daemon.ask(
        recipient="stranger@d1.test", sender="x@elsewhere.test", client_address="192.0.2.7", queue_id="ABC", sasl_username=""
    )
    static_daemon.wait_for_log("reason=unknown-recipient")
    expected = (
        "info policy: reject state=RCPT recipient=<stranger@d1.test> sender=<x@elsewhere.test> client=192.0.2.7"
        " queue_id=ABC reason=unknown-recipient elapsed_ms="
    )
    assert expected in static_daemon.log()
