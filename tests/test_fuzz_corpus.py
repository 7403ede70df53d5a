"""The fuzzer's inputs in the corpus pass its checks, without the fuzzer; and the checks find the faults they look for."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import stream_checks

import mailcloak

CORPUS = Path(stream_checks.__file__).parent / "corpus"
STREAMS = {"policy": mailcloak.PolicyStream, "socketmap": mailcloak.SocketmapStream}
INPUTS = [(name, path) for name in STREAMS for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize(("name", "path"), INPUTS, ids=[f"{name}-{path.name[:8]}" for name, path in INPUTS])
def test_kept_input_is_read_and_answered_as_the_fuzzer_demands(name, path):
    stream_checks.check(STREAMS[name], path.read_bytes())


def test_corpus_is_small_and_has_good_and_bad_streams_of_both_protocols():
    assert sum(path.stat().st_size for _, path in INPUTS) < 200_000
    for name, stream_class in STREAMS.items():
        inputs = [path.read_bytes() for each, path in INPUTS if each == name]
        outcomes = [stream_checks.feed(stream_class, stream_checks.to_pieces(data)) for data in inputs]
        assert 10 < len(inputs) < 100
        assert any(outcome.requests and outcome.error is None for outcome in outcomes)
        assert len({outcome.error for outcome in outcomes}) >= 4


# ---- the checks themselves: each fails on a parser or an answer that is wrong in the way it looks for


class ParserThatRaises(mailcloak.PolicyStream):
    def next_request(self):
        raise ValueError("not enough values to unpack")


class ParserThatKeeps(mailcloak.PolicyStream):
    def feed(self, data):
        super().feed(data)
        self.history = getattr(self, "history", b"") + data


class ParserOfPieces(mailcloak.PolicyStream):
    def feed(self, data):
        super().feed(data.strip(b"\n") + b"\n\n" if data.endswith(b"\n") else data)


class ParserThatQuotes(mailcloak.PolicyStream):
    def next_request(self):
        raise mailcloak.ProtocolError("expected a request, got a\nb")


class AnswerOfTwoLines(mailcloak.PolicyStream):
    @staticmethod
    def encode(action):
        return b"action=" + action.text.encode() + b"\naction=OK\n\n"


class NetstringTooShort(mailcloak.SocketmapStream):
    @staticmethod
    def encode(action):
        return b"%d:%s," % (len(action.text) - 1, action.text.encode())


GOOD_REQUEST = b"request=smtpd_access_policy\nprotocol_state=RCPT\nrecipient=alice@d1.test\n\n"


@pytest.mark.parametrize(
    ("stream_class", "data", "failure"),
    [
        pytest.param(ParserThatRaises, b"x", ValueError, id="other-exception"),
        pytest.param(ParserThatKeeps, GOOD_REQUEST + b"\xfc", AssertionError, id="unbounded"),
        pytest.param(ParserOfPieces, GOOD_REQUEST.replace(b"RCPT\n", b"RCPT\n\xf8"), AssertionError, id="pieces"),
        pytest.param(ParserThatQuotes, b"x", AssertionError, id="error-on-two-lines"),
        pytest.param(AnswerOfTwoLines, GOOD_REQUEST, AssertionError, id="answer-of-two-lines"),
        pytest.param(NetstringTooShort, b"18:alias info@d1.test,", AssertionError, id="short-netstring"),
    ],
)
def test_check_finds_a_parser_that_is_wrong(stream_class, data, failure):
    with pytest.raises(failure):
        stream_checks.check(stream_class, data)


def test_check_finds_text_that_is_not_escaped(monkeypatch):
    monkeypatch.setattr(mailcloak, "escape_for_log", lambda text: text)
    with pytest.raises(AssertionError, match="ends a value"):
        stream_checks.check(mailcloak.PolicyStream, GOOD_REQUEST.replace(b"alice@", b"a b@"))
    with pytest.raises(AssertionError, match="cannot be printed"):
        stream_checks.check(mailcloak.PolicyStream, GOOD_REQUEST.replace(b"alice@", b"a\rb@"))


def test_pieces_of_an_input_are_as_its_bytes_say():
    assert stream_checks.to_pieces(b"ab\xf8c\xf8\xf8d") == [b"ab", b"c", b"", b"d"]
    assert stream_checks.to_pieces(b"a\xf9bc\xfad") == [b"a"] * 4 + [b"bcbcbcbc"] * 4 + [b"d"]
    assert sum(map(len, stream_checks.to_pieces(b"x" * 100 + b"\xfd" + b"y" * 100))) <= stream_checks.MAX_STREAM_BYTES
