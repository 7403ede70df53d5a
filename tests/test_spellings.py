"""Spellings of a domain: what Postfix takes for a domain of ours is never one of others here, whatever its characters.

Two oracles: the function of Postfix's own library, fast enough for every code point, and a real Postfix over SMTP, for the spellings
that once came through and to show that smtpd does as the library says.
"""

from __future__ import annotations

import random
import subprocess
import sys
import unicodedata

import idna
import pytest
from conftest import running
from real.postfix import PATH, PrivatePostfix, daemon_behind

from mailcloak import NOT_CONVERTIBLE, normalise_address

CAPITAL_SHARP_S = "\u1e9e"
CODE_POINTS = [*range(0x80, 0xD800), *range(0xE000, 0x110000)]
# Some of each script, and all where the mapping is dense: Latin, Greek, letters with forms, full-width forms.
SAMPLE = [
    code
    for code in CODE_POINTS
    if code % 61 == 0 or code < 0x530 or 0x1E00 <= code < 0x2200 or 0xFB00 <= code < 0xFB07 or code >> 8 == 0xFF
]

# Beside another character, alone, beside a letter that is not ASCII, as the first (what joins cannot be there), in the last label.
FORMS = ("a{}b.test", "{}.test", "ü{}ü.test", "d1.te{}st", "ss_{}.d1.test")

# Of each line the two names by which Postfix may know the domain: midna_domain_to_ascii of it (how it looks it up in DNS), and of what
# casefold makes of it (how it compares it with its lists of domains); "" where it cannot convert. Its warnings go to stderr.
PROGRAM = """
import ctypes, sys
postfix = ctypes.CDLL(sys.argv[1])
to_ascii, fold, postfix.vstring_alloc.restype = postfix.midna_domain_to_ascii, postfix.casefoldx, ctypes.c_void_p
to_ascii.argtypes, to_ascii.restype = [ctypes.c_char_p], ctypes.c_char_p
fold.argtypes, fold.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ssize_t], ctypes.c_char_p
buffer, utf8 = postfix.vstring_alloc(ctypes.c_ssize_t(100)), 1
for line in sys.stdin.buffer.read().split(b"\\n"):
    names = to_ascii(line) or b"", to_ascii(fold(utf8, buffer, line, -1)) or b""
    sys.stdout.buffer.write(b" ".join(names) + b"\\n")
"""


@pytest.fixture(scope="module")
def library():
    """The file of Postfix's library that converts domains, with the ICU that this Postfix uses."""
    command = ["postconf", "-h", "shlib_directory"]
    directory = subprocess.run(command, check=True, capture_output=True, text=True, env={"PATH": PATH}).stdout.strip()
    return f"{directory}/libpostfix-util.so"


def ask_postfix(library, domains):
    """The two names by which Postfix may know each domain, "" where it cannot convert it; asked in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, library],
        check=True,
        input="\n".join(domains).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    names = [line.split(" ") for line in result.stdout.decode("ascii").split("\n")]
    assert len(names) == len(domains) + 1
    return names[:-1]


def compare(library, domains):
    """Raise unless each name by which Postfix may know a domain is known here as well, or the domain counts as possibly ours.

    Whatever our domains are, then, none is ours to Postfix and of others here. Returns the domains that Postfix alone converts.
    """
    deferred, wrong, converted = [], [], 0
    for domain, names in zip(domains, ask_postfix(library, domains)):
        address = normalise_address(f"x@{domain}")
        converted += bool(names[0])
        if address.domain == NOT_CONVERTIBLE:
            deferred += [domain] if names[0] else []
        elif not set(names) <= {"", address.domain, address.folded_domain}:
            wrong.append((ascii(domain), names, address))
    assert wrong == []
    assert converted > len(domains) / 20
    return deferred


def is_explained(domain):
    """Is there a reason why this is not converted: capital sharp s, or a character that this Python or this idna does not know yet?"""
    if CAPITAL_SHARP_S in domain or any(unicodedata.category(character) == "Cn" for character in domain):
        return True
    try:
        return not idna.uts46_remap(domain, std3_rules=False)
    except idna.IDNAError:
        return True


@pytest.mark.real("postfix")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "code_points",
    [pytest.param(SAMPLE, id="sample"), pytest.param(CODE_POINTS, id="all", marks=[pytest.mark.long, pytest.mark.timeout(600)])],
)
def test_character_in_a_domain_is_converted_as_postfix_does_or_not_at_all(library, form, code_points):
    deferred = compare(library, [form.format(chr(code)) for code in code_points])
    assert form.format(CAPITAL_SHARP_S) in deferred
    assert [ascii(domain) for domain in deferred if not is_explained(domain)] == []


@pytest.mark.real("postfix")
def test_characters_together_are_converted_as_postfix_does_or_not_at_all(library):
    """What is composed, put in order, left out or mapped to a dot beside others."""
    rng = random.Random(13)
    joining = [chr(code) for code in range(0x300, 0x370)] + list(
        "\u05b0\u0327\u0653\u093c\u1100\u1161\u11a8\u3099\u200c\u200d\u00ad\ufe0f"
    )
    plain = [*"abcsx019-_.ABS", "xn--", "ss"]
    other = list("üÜßẞσςΣİıſ\u212a\u2126\u3002\uff0e\uff61\uff11\uff3f\uff20\uff05ﬁﬃ㏑½℀⒈😀☃\u2260\u1e9bか가")
    domains = []
    for _ in range(10_000):
        label = "".join(rng.choice(rng.choice((plain, joining, other))) for _ in range(rng.randrange(1, 8)))
        domains.append(f"{rng.choice(('', 'd1.', 'ü.'))}{label}{rng.choice(('.test', '。test', 'ü'))}")
    compare(library, [domain for domain in domains if not domain.isascii()])


@pytest.mark.real("postfix")
@pytest.mark.parametrize("count", [1, 200, 255, 1500])
def test_domain_with_many_ignored_characters_is_ours_to_postfix_and_not_of_others_here(library, count):
    domain = "d1" + "\u00ad" * count + ".test"
    assert ask_postfix(library, [domain]) == [["d1.test", "d1.test"]]
    assert normalise_address(f"x@{domain}").domain == ("d1.test" if count <= 200 else NOT_CONVERTIBLE)


# ---- Over SMTP

OURS = ("strasse_a.test", "xn--e28h.test")
IN_ITS_LISTS = {  # other spellings of the first that smtpd itself finds among its domains: it would queue mail for whoever is there
    "sharp-s": "straße_a.test",
    "capital-sharp-s": "STRAẞE_A.test",
    "long-s": "ſtraſſe_a.TEST",
}
IN_DNS = {  # spellings of either that Postfix only makes into its own domain when it looks for a server, for a client that may relay
    "ignored": "strasse_\u00ada.test",
    "255-ignored": "strasse_a" + "\u00ad" * 255 + ".test",
    "fullwidth-letter": "ｓtrasse_a.test",
    "fullwidth-low-line": "strasse＿a.test",
    "emoji": "😀.test",
    "emoji-with-selector": "😀\ufe0f.TEST",
    "fullwidth-a-label": "ＸＮ--e28h.test",
    "wide-dot": "strasse_a。test",
}
SPELLINGS = {**IN_ITS_LISTS, **IN_DNS}
# lists  takes what smtpd finds among its domains, and asks nobody
# alone  asks mailcloak and nothing else, and lets its clients relay
SERVICES = """\
127.0.0.1:{lists} inet n - y - - smtpd
  -o smtpd_sender_restrictions=
  -o smtpd_recipient_restrictions=reject_unauth_destination
127.0.0.1:{alone} inet n - y - - smtpd
  -o mynetworks=127.0.0.0/8
  -o {{ smtpd_sender_restrictions = check_policy_service {{ unix:private/mailcloak, policy_context=sender }} }}
  -o {{ smtpd_recipient_restrictions = check_policy_service {{ unix:private/mailcloak, policy_context=recipient }} }}
"""


@pytest.fixture(scope="module")
def postfix():
    settings = {"virtual_transport": "discard:", "mynetworks": "127.0.0.2/32", "mydestination": "mx.test, localhost"}
    settings["smtpd_discard_ehlo_keywords"] = ""  # the sample offers no SMTPUTF8; a host that does gets these spellings
    with running(PrivatePostfix(OURS, settings, services=SERVICES, ports=["lists", "alone"])) as instance:
        yield instance


@pytest.fixture(scope="module")
def daemon(postfix):
    users = {"alice": "alice@strasse_a.test", "bob": "bob@xn--e28h.test"}
    with running(daemon_behind(postfix, static_users=users, policy={"domain": list(OURS)})) as instance:
        yield instance


def say(postfix, port, sender, recipient):
    """What MAIL FROM and RCPT TO get, all of it in UTF-8."""
    with postfix.smtp(port) as client:
        client.command_encoding = "utf-8"
        answers = [client.docmd(f"MAIL FROM:<{sender}> SMTPUTF8"), client.docmd(f"RCPT TO:<{recipient}>")]
    return [f"{code} {text.decode(errors='replace')}" for code, text in answers]


def kept_away(spelling, code):
    """The beginning of the right answer: this code where the spelling is one of ours for certain, else "later"."""
    return code if normalise_address(f"x@{spelling}").domain in OURS else "451 4.3.0"


each_spelling = pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)


@pytest.mark.real("postfix", "root")
@each_spelling
def test_library_tells_how_smtpd_and_dns_know_a_spelling(postfix, daemon, library, spelling):
    in_dns, folded = ask_postfix(library, [spelling])[0]
    assert in_dns in OURS or folded in OURS
    found = say(postfix, "lists", "x@elsewhere.test", f"alice@{spelling}")[1]
    if spelling in IN_ITS_LISTS.values():
        assert folded in OURS
        assert not found.startswith("554")  # later, where its alias map says so; but it is a domain of its own
    else:
        assert found.startswith("554 5.7.1")


@pytest.mark.real("postfix", "root")
@each_spelling
@pytest.mark.parametrize("form", ["{}@{}", "{}%{}@localhost", "@x.test:{}@{}"])
def test_unknown_recipient_is_not_taken_however_our_domain_is_spelled(postfix, daemon, spelling, form):
    answers = say(postfix, "alone", "x@elsewhere.test", form.format("stranger", spelling))
    assert answers[0].startswith("250")
    assert answers[1].startswith(kept_away(spelling, "550 5.1.1"))


@pytest.mark.real("postfix", "root")
@each_spelling
def test_forged_sender_is_not_taken_however_our_domain_is_spelled(postfix, daemon, spelling):
    answer = say(postfix, "alone", f"alice@{spelling}", "alice@strasse_a.test")[1]
    assert answer.startswith(kept_away(spelling, "553 5.7.1"))


@pytest.mark.real("postfix", "root")
@each_spelling
def test_mail_for_a_user_is_taken_or_deferred_however_our_domain_is_spelled(postfix, daemon, spelling):
    user = "bob" if "e28h" in normalise_address(f"x@{spelling}").domain else "alice"
    answer = say(postfix, "alone", "x@elsewhere.test", f"{user}@{spelling}")[1]
    assert answer.startswith(kept_away(spelling, "250"))
