"""The completion files of bash and zsh offer what the programs take: no more, no less."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run_ctl, wait_until
from test_docs import parsers_of

import mailcloakctl

COMPLETIONS = ROOT / "completions"
PARSERS = dict(parsers_of(mailcloakctl.build_parser()))


def long_options(parser):
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


def daemon_options():
    """The long options of mailcloak, as its --help has them."""
    said = subprocess.run([sys.executable, str(ROOT / "mailcloak.py"), "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", said))


def words_of(parser):
    """The commands that may stand where the parser is, and the choices of its arguments."""
    return {word for action in parser._actions if not action.option_strings for word in action.choices or ()}


def questions():
    """What is typed, and the words that must be offered then."""
    asked = {("mailcloak", "--"): daemon_options()}
    for path, parser in PARSERS.items():
        asked[("mailcloakctl", *path, "--")] = long_options(parser)
        if words_of(parser):
            asked[("mailcloakctl", *path, "")] = words_of(parser)
    first = ("mailcloakctl", "--db", "/tmp/x", "--json")  # a value is not a command
    asked[(*first, "aliases", "")] = words_of(PARSERS[("aliases",)])
    asked[("mailcloakctl", "aliases", "--json", "en")] = {"enable"}
    asked[("mailcloakctl", "ask", "sender", "a@d1.test", "--method", "X")] = {"XOAUTH2"}
    asked[("mailcloakctl", "apps", "add", "printer", "--expires", "n")] = {"never"}
    asked[("mailcloakctl", "--config", str(COMPLETIONS) + "/mailcloakc")] = {str(COMPLETIONS / "mailcloakctl.bash")}
    asked[("mailcloak", str(COMPLETIONS) + "/mailcloakc")] = {str(COMPLETIONS / "mailcloakctl.bash")}
    return asked


def options_with_values():
    return {
        option
        for parser in PARSERS.values()
        for action in parser._actions
        for option in action.option_strings
        if action.nargs in (None, "?") and option.startswith("--")
    }


# ---- bash


def bash_offers(asked):
    """For each question the words that bash's own completion function leaves in COMPREPLY."""
    script = "".join(f"source {shlex.quote(str(COMPLETIONS / name))}\n" for name in ("mailcloak.bash", "mailcloakctl.bash"))
    for words in asked:
        script += f"COMP_WORDS=({' '.join(map(shlex.quote, words))}) COMP_CWORD={len(words) - 1}; _{words[0]}\n"
        script += "printf '%s\\n' \"${COMPREPLY[@]}\" ===\n"
    said = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert said.stderr == ""
    return [set(filter(None, part.split("\n"))) for part in said.stdout.split("===\n")[:-1]]


def test_bash_offers_what_the_programs_take():
    asked = questions()
    assert dict(zip(asked, bash_offers(asked))) == asked


@pytest.fixture
def names(short_dir, monkeypatch):
    """A database with names in it, and mailcloakctl on the path; what is typed, and the names that must be offered then."""
    (short_dir / "mailcloakctl").write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/mailcloakctl.py "$@"\n')
    (short_dir / "mailcloakctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{short_dir}:{os.environ['PATH']}")
    first = ("mailcloakctl", "--db", f"{short_dir}/state.db")
    run_ctl(*first[1:], "aliases", "add", "info@d1.test", "alice")
    run_ctl(*first[1:], "aliases", "add", "a-very-long-address-that-is-whole@d1.test", "alice")
    run_ctl(*first[1:], "apps", "add", "printer", "--generate")
    aliases = {"info@d1.test", "a-very-long-address-that-is-whole@d1.test"}
    return {
        **{(*first, "aliases", verb, ""): aliases for verb in ("del", "enable", "disable")},
        **{(*first, "apps", verb, ""): {"printer"} for verb in ("set", "allow", "disallow", "del", "enable", "disable")},
    }


def test_bash_offers_names_that_are_there(names):
    offered = dict(zip(names, bash_offers(names)))
    assert offered == names


@pytest.mark.real("zsh")
def test_zsh_offers_names_that_are_there(names, short_dir):
    offered = dict(zip(names, zsh_offers(names, short_dir)))
    assert {words: {word.rstrip(" ") for word in found} for words, found in offered.items()} == names


@pytest.mark.parametrize("behind", [[], ["aliases", "li"]], ids=["path", "command behind it"])
def test_bash_reads_an_option_and_its_value_in_one_word(behind):
    """Bash makes three words of it."""
    words = ("mailcloakctl", "--config", "=", str(COMPLETIONS) + "/mailcloakc", *behind)
    assert bash_offers([words]) == [{"list"} if behind else {str(COMPLETIONS / "mailcloakctl.bash")}]


def test_bash_registers_both_programs():
    script = f"source {COMPLETIONS}/mailcloak.bash; source {COMPLETIONS}/mailcloakctl.bash; complete -p mailcloak mailcloakctl"
    said = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == "complete -o filenames -F _mailcloak mailcloak\ncomplete -F _mailcloakctl mailcloakctl\n"


def test_bash_knows_every_option_that_takes_a_value():
    text = (COMPLETIONS / "mailcloakctl.bash").read_text()
    (skipped,) = re.findall(r"^ +(--config .*)\) # and its value$", text, re.MULTILINE)
    assert set(skipped.split(" | ")) == options_with_values()


# ---- zsh, in a terminal of its own: its completion functions work inside its line editor alone

ZSH = r"""
autoload -U compinit && compinit -D -u
exec 3>$RESULT.part
compadd() {  # note what is offered; from Valentin Ochs' idea of a compadd that tells
    local -a offered
    if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then builtin compadd "$@"; return; fi
    builtin compadd -O offered "$@"
    (( $#offered )) && print -rl -u3 -- "$IPREFIX${(@)^offered}"
    builtin compadd "$@"
}
answer-all() {
    local line
    for line in "${(@f)$(<$QUESTIONS)}"; do
        BUFFER=${line%.} CURSOR=$#BUFFER
        zle complete-word 2>/dev/null
        print -r -u3 -- '==='
    done
    exec 3>&-
    mv $RESULT.part $RESULT
    BUFFER=
}
zstyle ':completion:*' verbose no
zle -N answer-all
bindkey '^X^X' answer-all
print READY
"""


def zsh_offers(asked, directory):
    """For each question the words that zsh's completion system adds."""
    (directory / "questions").write_text("".join(" ".join(map(shlex.quote, words[:-1])) + f" {words[-1]}.\n" for words in asked))
    (directory / ".zshrc").write_text(f"fpath=({shlex.quote(str(COMPLETIONS))} $fpath)\n{ZSH}")
    result = directory / "result"
    environment = {**os.environ, "ZDOTDIR": str(directory), "QUESTIONS": str(directory / "questions"), "RESULT": str(result)}
    terminal, other = pty.openpty()
    shell = subprocess.Popen(
        ["zsh", "-d", "-i"], stdin=other, stdout=other, stderr=other, env={**environment, "TERM": "dumb"}, start_new_session=True
    )
    os.close(other)
    seen = b""
    try:
        while b"READY" not in seen:
            seen += os.read(terminal, 4096)
        os.write(terminal, b"\x18\x18")
        os.set_blocking(terminal, False)

        def is_done():
            try:
                while os.read(terminal, 65536):
                    pass
            except BlockingIOError:
                return result.exists()

        wait_until(is_done, 60, what="answers of zsh")
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)
    return [set(filter(None, part.split("\n"))) for part in result.read_text().split("===\n")[:-1]]


@pytest.mark.real("zsh")
def test_zsh_offers_what_the_programs_take(short_dir):
    asked = questions()
    offered = dict(zip(asked, zsh_offers(asked, short_dir)))
    for words, expected in asked.items():
        found = {word.rstrip(" ") for word in offered[words]}
        if words[-1] == "--":
            found.discard("--")
        if "/" in words[-1]:
            expected = {word.rpartition("/")[2] for word in expected}
            found = {word.rpartition("/")[2] for word in found}
        if words[-1] == "" or words[-1] == "--":
            assert found == expected, words
        else:
            assert expected <= found, words
