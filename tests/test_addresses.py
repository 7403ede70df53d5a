"""Addresses: the form that Postfix will act on, the extension, what is no plain address, quoting."""

from __future__ import annotations

import re
import string
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

import mailcloak
from mailcloak import (
    NOT_CONVERTIBLE,
    Address,
    domain_to_ascii,
    format_mailbox,
    normalise_address,
    parse_plain_address,
    quote_local_part,
    split_extension,
    to_unicode_domain,
)

NORMALISED = {
    "plain": ("bob@d1.test", Address("bob", "d1.test")),
    "uppercase": ("Bob@D1.TEST", Address("bob", "d1.test")),
    "uppercase non-ASCII local part": ("JÖRG@d1.test", Address("jörg", "d1.test")),
    "null sender": ("", Address("", "")),
    "bare": ("Bob", Address("bob", "")),
    "bare with extension": ("bob+tag", Address("bob+tag", "")),
    "extension kept": ("bob+tag@d1.test", Address("bob+tag", "d1.test")),
    "trailing dot": ("bob@d1.test.", Address("bob", "d1.test")),
    "dot-dot": ("bob@d1.test..", Address("bob", "d1.test..")),
    "at-dot": ("bob@.", Address("bob", ".")),
    "empty domain": ("bob@", Address("bob", "")),
    "only at": ("@", Address("@", "")),
    "only domain": ("@d1.test", Address("", "d1.test")),
    "several at": ("bob@other.test@d1.test", Address("bob@other.test", "d1.test")),
    "several at, quoted": ('"bob@other.test"@d1.test', Address('"bob@other.test"', "d1.test")),
    "source route": ("@relay.test:bob@d1.test", Address("bob", "d1.test")),
    "source route of two": ("@r1.test,@r2.test:bob@d1.test", Address("bob", "d1.test")),
    "source route before a bare name": ("@relay.test:bob", Address("bob", "")),
    "source route before percent": ("@relay.test:bob%d1.test", Address("bob", "d1.test")),
    "colon without at in front": ("relay.test:bob@d1.test", Address("relay.test:bob", "d1.test")),
    "percent": ("bob%d1.test", Address("bob", "d1.test")),
    "percent, uppercase": ("Bob%D1.Test", Address("bob", "d1.test")),
    "percent, trailing dot": ("bob%d1.test.", Address("bob%d1.test.", "")),  # Postfix puts it into quotes
    "percent twice": ("bob%d2.test%d1.test", Address("bob%d2.test", "d1.test")),
    "percent and at": ("bob%d1.test@other.test", Address("bob%d1.test", "other.test")),
    "bang": ("d1.test!bob", Address("bob", "d1.test")),
    "bang, uppercase": ("D1.TEST!Bob", Address("bob", "d1.test")),
    "bang twice": ("d1.test!d2.test!bob", Address("d2.test!bob", "d1.test")),
    "bang and at": ("d1.test!bob@other.test", Address("d1.test!bob", "other.test")),
    "bang before percent": ("d1.test!bob%d2.test", Address("bob%d2.test", "d1.test")),
    "U-label": ("hans@bücher.test", Address("hans", "xn--bcher-kva.test")),
    "U-label, uppercase": ("hans@BÜCHER.test", Address("hans", "xn--bcher-kva.test")),
    "U-label, sharp s": ("hans@straße.test", Address("hans", "xn--strae-oqa.test", "strasse.test")),
    "U-label, trailing dot": ("hans@bücher.test.", Address("hans", "xn--bcher-kva.test")),
    "U-label by percent": ("hans%bücher.test", Address("hans", "xn--bcher-kva.test")),
    "U-label by bang": ("bücher.test!hans", Address("hans", "xn--bcher-kva.test")),
    "fullwidth letters": ("hans@ｄ１.test", Address("hans", "d1.test")),
    "A-label": ("hans@XN--BCHER-KVA.test", Address("hans", "xn--bcher-kva.test")),
    "emoji": ("hans@😀.test", Address("hans", "xn--e28h.test")),
    "sign that IDNA 2008 has not": ("hans@☃.test", Address("hans", "xn--n3h.test")),
    "low line in a U-label": ("hans@bü_cher.test", Address("hans", "xn--b_cher-3ya.test")),
    "fullwidth low line": ("hans@d＿1.test", Address("hans", "d_1.test")),
    "ignored signs": ("hans@\u00add1.te\u2060s\ufe0ft", Address("hans", "d1.test")),
    "final sigma in capitals": ("x@d1.ΟΔΟΣ", Address("x", "d1.xn--pxavbq")),  # str.lower() would make it the other sigma
    "final sigma": ("x@d1.οδος", Address("x", "d1.xn--pxavbm", "d1.xn--pxavbq")),
    "Kelvin sign": ("x@\u212a1.test", Address("x", "k1.test")),
    "not composed": ("hans@bu\u0308cher.test", Address("hans", "xn--bcher-kva.test")),
    "A-label beside a U-label": ("x@XN--BCHER-KVA.ü.test", Address("x", "xn--bcher-kva.xn--tda.test")),
    "not convertible: capital sharp s": ("hans@STRAẞE.test", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: 255 soft hyphens": ("hans@d1" + "\u00ad" * 255 + ".test", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: unassigned sign": ("hans@☃\u0378.test", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: empty label": ("hans@bücher..test", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: label too long": ("hans@" + "ü" * 64 + ".test", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: label too long once it is an A-label": ("hans@" + "a" * 60 + "ü.test", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: ASCII label too long": ("hans@" + "a" * 64 + ".ü.test", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: very long": ("hans@" + "ü" * 5000, Address("hans", NOT_CONVERTIBLE)),
    "not convertible: fullwidth at sign": ("hans@x＠d1.test", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: fullwidth space": ("hans@d1\u3000.test", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: nothing left": ("hans@\u00ad", Address("hans", NOT_CONVERTIBLE)),
    "not convertible: by percent": ("hans%STRAẞE.test", Address("hans", NOT_CONVERTIBLE)),
    "not UTF-8": ("hans@d1\udcff.test", Address("hans", NOT_CONVERTIBLE)),
    "the mark itself": (f"hans@{NOT_CONVERTIBLE}", Address("hans", NOT_CONVERTIBLE)),
    "capital sharp s in a local part": ("GROẞ@d1.test", Address("groß", "d1.test")),
    "address literal": ("bob@[192.0.2.1]", Address("bob", "[192.0.2.1]")),
}


@pytest.mark.parametrize(("raw", "address"), NORMALISED.values(), ids=NORMALISED)
def test_normalise_address_gives_the_form_that_postfix_acts_on(raw, address):
    assert normalise_address(raw) == address


def test_conversion_and_reload_load_no_module_at_run_time(tmp_path):
    """After import_http() the daemon gives its privileges up, and may not be able to read the module."""
    (tmp_path / "config.yaml").write_text(f"polici: {{}}\nkeycloak: {{ca_file: {tmp_path}/config.yaml}}\n")
    program = """if True:
        import sys, mailcloak
        mailcloak.import_http()
        before = set(sys.modules)
        mailcloak.to_unicode_domain(mailcloak.normalise_address("x@bücher.test").text)
        problems = "".join(map(str, mailcloak.read_blocks(sys.argv[1])[1]))
        assert "did you mean 'policy'" in problems and "CA certificates" in problems, problems
        print(sorted(set(sys.modules) - before))"""
    command = [sys.executable, "-c", program, str(tmp_path / "config.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "[]\n"


def test_routing_steps_convert_each_domain_as_it_was_written():
    """Lower-cased before, a final sigma becomes another letter, and capital sharp s one that can be converted."""
    raw = "X%STRAẞE.test%D1.ΟΔΟΣ@Elsewhere.test"
    assert list(mailcloak.routing_steps(raw)) == [
        Address("x%straße.test%d1.οδος", "elsewhere.test"),
        Address("x%straße.test", "d1.xn--pxavbq"),
        Address("x", NOT_CONVERTIBLE),
    ]


# Text in which the signs that matter are frequent.
ADDRESS_LIKE = st.one_of(
    st.text(), st.text(alphabet='ab.@%!:+-,<>"\\ üßẞΑΣİ😀\u3002\uff0e\uff20\u00ad\u200d\ufffd\udcff', max_size=40)
)


@given(ADDRESS_LIKE)
@example("@a:@b:c@d")
@example("bob@bücher.test。")
@example("@。")
def test_normalise_address_of_its_own_result_is_the_same(raw):
    address = normalise_address(raw)
    assert address.text == address.text.lower()
    if address.local_part and address.domain:
        assert normalise_address(address.text) == address._replace(folded_domain="")


@given(ADDRESS_LIKE)
def test_plain_address_that_is_accepted_is_normalised(text):
    try:
        address = parse_plain_address(text)
    except ValueError as exc:
        assert str(exc)
        return
    assert address.is_plain
    assert normalise_address(text)[:2] == normalise_address(address.text)[:2] == address[:2]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (Address("bob", "d1.test"), True),
        (Address("jörg", "d1.test"), True),
        (Address("", ""), False),
        (Address("bob", ""), False),
        (Address("", "d1.test"), False),
        (Address("bob smith", "d1.test"), False),
        (Address("bob\n", "d1.test"), False),
        (Address("bob\udcff", "d1.test"), False),
        (Address("bob\x7f", "d1.test"), False),
        (Address("bob\x85", "d1.test"), False),
        (Address("bob\u2028", "d1.test"), False),
        (Address("bob\u3000", "d1.test"), False),
        (Address("می\u200cخواهم", "d1.test"), True),
        (Address("क्\u200dष", "d1.test"), True),
        (Address("bob\U000e0fff", "d1.test"), True),
        (Address("bob", NOT_CONVERTIBLE), False),
        (Address("b" * 246, "d1.test"), True),
        (Address("b" * 247, "d1.test"), False),
    ],
    ids=[
        "plain",
        "non-ASCII",
        "null",
        "no domain",
        "no local part",
        "space",
        "newline",
        "not UTF-8",
        "delete",
        "C1 control",
        "line separator",
        "wide space",
        "Persian with a non-joiner",
        "Indic with a joiner",
        "character that Python does not know",
        "domain not convertible",
        "254 characters",
        "255 characters",
    ],
)
def test_address_is_plain_when_somebody_could_have_it(address, expected):
    assert address.is_plain is expected


SPLIT = {
    "no extension": ("bob", "+", "bob", ""),
    "no delimiter set": ("bob+tag", "", "bob+tag", ""),
    "extension": ("bob+tag", "+", "bob", "+tag"),
    "empty extension": ("bob+", "+", "bob", "+"),
    "first of several": ("bob+a+b", "+", "bob", "+a+b"),
    "set: first in the address": ("bob-a+b", "+-", "bob", "-a+b"),
    "set: order does not matter": ("bob+a-b", "-+", "bob", "+a-b"),
    "other delimiter": ("bob-tag", "+", "bob-tag", ""),
    "base would be empty": ("+tag", "+", "+tag", ""),
    "base would be empty, more follow": ("+a+b", "+", "+a+b", ""),
    "only the delimiter": ("+", "+", "+", ""),
    "empty": ("", "+", "", ""),
    "postmaster": ("postmaster", "m", "postmaster", ""),
    "postmaster with extension": ("postmaster+tag", "+", "postmaster", "+tag"),
    "mailer-daemon": ("mailer-daemon", "-", "mailer-daemon", ""),
    "double-bounce": ("double-bounce", "+-", "double-bounce", ""),
    "owner with minus": ("owner-list", "-", "owner-list", ""),
    "owner with plus alone": ("owner-list+tag", "+", "owner-list", "+tag"),
    "owner with both": ("owner-list+tag", "+-", "owner-list+tag", ""),
    "owner without minus": ("owner+tag", "+-", "owner", "+tag"),
    "request with minus": ("list-request", "-", "list-request", ""),
    "request with both": ("list+tag-request", "+-", "list+tag-request", ""),
    "request with plus alone": ("list+tag-request", "+", "list", "+tag-request"),
    "request in the middle": ("list-request-x", "-", "list", "-request-x"),
    "request alone": ("-request", "-", "-request", ""),
    "non-ASCII": ("jörg+ü", "+", "jörg", "+ü"),
}


@pytest.mark.parametrize(("local_part", "delimiters", "base", "extension"), SPLIT.values(), ids=SPLIT)
def test_split_extension_follows_split_addr(local_part, delimiters, base, extension):
    assert split_extension(local_part, delimiters) == (base, extension)


@given(st.text(alphabet="abö+-=_.", max_size=20), st.text(alphabet="+-=_", max_size=4))
@example("owner-list", "-")
def test_split_extension_loses_no_character(local_part, delimiters):
    base, extension = split_extension(local_part, delimiters)
    assert base + extension == local_part
    assert bool(base) == bool(local_part)
    if extension:
        assert extension[0] in delimiters
        assert not set(base) & set(delimiters)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hans@xn--bcher-kva.test", "hans@bücher.test"),
        ("hans@xn--bcher-kva.xn--tda.test", "hans@bücher.ü.test"),
        ("hans@xn--e28h.test", "hans@😀.test"),
        ("hans@xn--strae-oqa.test", "hans@straße.test"),
        ("xn--bcher-kva.test", "bücher.test"),
        ("xn--tda@d1.test", "xn--tda@d1.test"),
        ("hans@d1.test", "hans@d1.test"),
        ("hans", "hans"),
        ("", ""),
        ("hans@xn--.test", "hans@xn--.test"),
        ("hans@xn--tda..test", "hans@xn--tda..test"),
        ("hans@xn--zzzz99999.test", "hans@xn--zzzz99999.test"),
        ("hans@xn--99999999999999.test", "hans@xn--99999999999999.test"),
        ("hans@xn--\udcff.test", "hans@xn--\udcff.test"),
        ("hans@xn--zzzz99999.xn--tda.test", "hans@xn--zzzz99999.ü.test"),
        (f"hans@{NOT_CONVERTIBLE}", f"hans@{NOT_CONVERTIBLE}"),
    ],
)
def test_unicode_domain_is_what_people_write_or_stays(address, expected):
    assert to_unicode_domain(address) == expected


@given(st.text(alphabet="abx-n.@89ü", max_size=20), st.text(max_size=20))
def test_unicode_domain_leads_back_to_its_address(head, tail):
    for text in (f"a@xn--{head}", f"{head}@{domain_to_ascii(tail)}", tail):
        normalised = normalise_address(text)
        assert normalise_address(to_unicode_domain(normalised.text)).text == normalised.text or not normalised.domain


def test_address_spellings_of_a_tagged_address_are_itself_then_its_base():
    address = normalise_address("Bob+Tag@d1.test")
    assert mailcloak.address_spellings(address, "+") == [(address, ""), (Address("bob", "d1.test"), "+tag")]
    assert mailcloak.address_spellings(address, "") == [(address, "")]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("Info@D1.Test", Address("info", "d1.test")),
        ("JÖRG@Bücher.test", Address("jörg", "xn--bcher-kva.test")),
        ("bob@d1.test.", Address("bob", "d1.test")),
        ("o'neil/x=y+tag@d1.test", Address("o'neil/x=y+tag", "d1.test")),
        ("Hans@😀.test", Address("hans", "xn--e28h.test")),
        ("می\u200cخواهم@d1.test", Address("می\u200cخواهم", "d1.test")),
        ("b" * 246 + "@d1.test", Address("b" * 246, "d1.test")),
    ],
    ids=["uppercase", "internationalised", "trailing dot", "odd but unquoted", "emoji", "non-joiner", "254 characters"],
)
def test_parse_plain_address_accepts_and_normalises(text, address):
    assert parse_plain_address(text) == address


REFUSED = {
    "empty": ("", "it has no @"),
    "no at": ("bob", "it has no @"),
    "two at": ("bob@d2.test@d1.test", "it has more than one @"),
    "catch-all": ("@d1.test", "there is nothing before the @, and a catch-all for a whole domain is not supported"),
    "no domain": ("bob@", "'' is not a domain"),
    "only dots": ("bob@..", "'..' is not a domain"),
    "empty label": ("bob@d1..test", "'d1..test' is not a domain"),
    "label begins with a hyphen": ("bob@-d1.test", "'-d1.test' is not a domain"),
    "address literal": ("bob@[192.0.2.1]", "'[192.0.2.1]' is not a domain"),
    "domain not convertible": ("bob@STRAẞE.test", "'STRAẞE.test' is not a domain"),
    "space": ("bob smith@d1.test", "it holds a space or a control character"),
    "space around": (" bob@d1.test", "it holds a space or a control character"),
    "newline": ("bob@d1.test\n", "it holds a space or a control character"),
    "NUL": ("bob\0@d1.test", "it holds a space or a control character"),
    "escape": ("bob\x1b[2J@d1.test", "it holds a space or a control character"),
    "right-to-left override": ("bob\u202e@d1.test", "it holds a space or a control character"),
    "not UTF-8": ("bob\udcff@d1.test", "it holds a space or a control character"),
    "angle brackets": ("<bob@d1.test>", "the part before the @ would need quotes"),
    "quotes": ('"bob"@d1.test', "the part before the @ would need quotes"),
    "comma": ("bob,eve@d1.test", "the part before the @ would need quotes"),
    "backslash": ("bob\\@d1.test", "the part before the @ would need quotes"),
    "255 characters": ("b" * 247 + "@d1.test", "it is longer than 254 characters"),
    "255 characters once the domain is an A-label": ("b" * 230 + "@bücher.example.test", "it is longer than 254 characters"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_parse_plain_address_refuses_with_the_reason(text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_plain_address(text)


@pytest.mark.parametrize(
    ("local_part", "quoted"),
    [
        ("bob", "bob"),
        ("bob+tag", "bob+tag"),
        ("jörg", "jörg"),
        ("bob smith", '"bob smith"'),
        ('bob"smith', '"bob\\"smith"'),
        ("bob\\smith", '"bob\\\\smith"'),
        ("bob,eve", '"bob,eve"'),
        ("<bob>", '"<bob>"'),
        ("", '""'),
    ],
)
def test_quote_local_part_quotes_what_postfix_would_misread(local_part, quoted):
    assert quote_local_part(local_part) == quoted


@given(st.text(alphabet=string.printable, max_size=20))
def test_quoted_local_part_unquotes_to_itself(local_part):
    quoted = quote_local_part(local_part)
    if quoted == local_part:
        assert not set(local_part) & set(' "(),:;<>@[\\]\t\r\n\v\f')
    else:
        assert quoted.startswith('"')
        assert quoted.endswith('"')
        assert re.sub(r"\\(.)", r"\1", quoted[1:-1], flags=re.DOTALL) == local_part


@pytest.mark.parametrize(
    ("username", "extension", "domain", "mailbox"),
    [
        ("bob", "", "d1.test", "bob@d1.test"),
        ("bob", "+tag", "d1.test", "bob+tag@d1.test"),
        ("bob smith", "", "d1.test", '"bob smith"@d1.test'),
        ("bob smith", "+tag", "d1.test", '"bob smith+tag"@d1.test'),
        ("erin@d2.test", "", "d1.test", "erin@d2.test"),
        ("erin@d2.test", "+tag", "d1.test", "erin@d2.test"),
        ("zoe@d2.test,bob", "", "d1.test", '"zoe@d2.test,bob"@d1.test'),
        ("zoe@d2.test,bob", "+tag", "d1.test", '"zoe@d2.test,bob+tag"@d1.test'),
        ("@d2.test", "", "d1.test", '"@d2.test"@d1.test'),
        ("zoe@b\u00fccher.test", "+tag", "d1.test", "zoe@b\u00fccher.test"),
    ],
)
def test_format_mailbox_leads_to_the_user(username, extension, domain, mailbox):
    assert format_mailbox(username, extension, domain) == mailbox
