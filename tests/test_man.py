"""The manual pages say what the programs do: every option, command, key, default, log message, reason, signal and exit code."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from test_docs import BLOCKS, KEYS, default_of, parsers_of

import mailcloak
import mailcloakctl

PAGES = {path.name: path for path in (ROOT / "man").iterdir()}
MACROS = {"Cm", "Ar", "Op", "Oo", "Oc", "Xo", "Xc", "Li", "Pa", "Ev", "Dv", "Nm", "Ql", "Sy", "Pq", "Po", "Pc", "Dq"}
COMMANDS = {" ".join(path): parser for path, parser in parsers_of(mailcloakctl.build_parser()) if parser._subparsers is None}
COMMON = {"-h", "--help", "--config", "--db", "--json"}


def plain(line):
    """The text of a line of mdoc(7): without its macros, with a dash before each argument of Fl, and with escapes resolved."""
    words, dash = [], ""
    for word in line.lstrip(".").split():
        if word == "Fl":
            dash = "-"
        elif word in MACROS:
            dash = ""
        else:
            words.append(word if word in ("|", ",") else dash + word)
    text = " ".join(words)
    for escape, character in (("\\(aq", "'"), ("\\(dq", '"'), ("\\-", "-"), ("\\&", ""), ("\\e", "\\")):
        text = text.replace(escape, character)
    return text


def section(page, title):
    """The lines of one section of a page, or of a subsection."""
    text = PAGES[page].read_text(encoding="utf-8")
    return re.search(rf"^\.S[hs] {title}\n(.*?)(?=^\.S[hs] |\Z)", text, re.MULTILINE | re.DOTALL)[1].splitlines()


def whole_section(page, title):
    """The lines of one section of a page, with all its subsections."""
    text = PAGES[page].read_text(encoding="utf-8")
    return re.search(rf"^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)", text, re.MULTILINE | re.DOTALL)[1].splitlines()


def items(lines):
    """(head, lines of the body) for each item of the lists in these lines; a head that Xo spreads over several lines is one."""
    found, head = [], None
    for line in lines:
        if head is not None:
            head = f"{head} {line.lstrip('.')}"
        elif line.startswith(".It "):
            head = line[len(".It ") :]
        elif found:
            found[-1][1].append(line)
        if head is not None and (not head.startswith("Xo") or head.endswith("Xc")):
            found.append((plain(head), []))
            head = None
    return found


def options_in(text):
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


# ---- form


def test_pages_are_those_of_two_programs_and_a_file():
    assert set(PAGES) == {"mailcloak.8", "mailcloakctl.8", "mailcloak.yaml.5"}


@pytest.mark.real("mandoc")
@pytest.mark.parametrize("page", sorted(PAGES))
def test_page_has_no_fault_that_mandoc_knows(page):
    result = subprocess.run(["mandoc", "-Tlint", "-Wstyle", PAGES[page]], capture_output=True, text=True, check=False, timeout=30)
    # whether this host has the pages that ours refer to is no fault of ours
    said = [line for line in result.stdout.splitlines() if "referenced manual not found" not in line]
    assert said == []


@pytest.mark.real("mandoc")
@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_word_of_a_macro_is_printed(page):
    shown = subprocess.run(
        ["mandoc", "-Tascii", "-Owidth=78", PAGES[page]], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    shown = re.sub(r"\W+", " ", re.sub(".\b", "", shown))
    lines = [
        line
        for line in PAGES[page].read_text(encoding="utf-8").splitlines()
        if re.match(r"\.(Dq|Dl|Pq|Li|Pa|Cm|Ql|Sy|Ar|It|Nd|Ss|Sh) ", line)
    ]
    assert len(lines) > 20
    missing = [line for line in lines if re.sub(r"\W+", " ", plain(line.split(" ", 1)[1])).strip() not in shown]
    assert missing == [], "a word that is a macro of mdoc(7) too, such as No, wants \\& before it"


def test_pages_refer_to_one_another_and_to_nothing_of_ours_that_is_not_there():
    ours = {path.rsplit(".", 1)[0]: path.rsplit(".", 1)[1] for path in PAGES}
    for page, path in PAGES.items():
        named = dict(re.findall(r"^\.Xr (mailcloak\S*) (\d)", path.read_text(), re.MULTILINE))
        assert named == {name: number for name, number in ours.items() if f"{name}.{number}" != page}, page


# ---- mailcloak(8)


def program(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def test_every_option_of_the_daemon_is_there():
    said = subprocess.run([sys.executable, str(ROOT / "mailcloak.py"), "--help"], capture_output=True, text=True, check=True).stdout
    heads = " ".join(head for head, _ in items(section("mailcloak.8", "DESCRIPTION")))
    assert options_in(heads) == options_in(said)
    assert options_in(" ".join(map(plain, section("mailcloak.8", "SYNOPSIS")))) == options_in(said) - {"-h"}


def test_every_exit_code_is_there():
    codes = {getattr(mailcloak, name) for name in dir(mailcloak) if name.startswith("EXIT_")}
    assert {int(head) for head, _ in items(section("mailcloak.8", "EXIT STATUS"))} == codes


def test_every_signal_is_there():
    named = {head.strip() for heads, _ in items(section("mailcloak.8", "SIGNALS")) for head in heads.split(",")}
    assert named == {number.name for number in mailcloak.Daemon.SIGNALS}


def test_every_environment_variable_is_there():
    read = set()
    for node in ast.walk(program("mailcloak.py")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "os.environ":
            read.add(ast.literal_eval(node.args[0]))
    named = {head.strip() for heads, _ in items(section("mailcloak.8", "ENVIRONMENT")) for head in heads.split(",")}
    assert read - {"PATH"} == named


def test_every_map_is_there():
    source = (ROOT / "mailcloak.py").read_text(encoding="utf-8")
    (maps,) = re.findall(r"request\.name not in (\(.*?\))", source)
    named = [head.split()[0] for head, _ in items(section("mailcloak.8", "SOCKETMAP MAPS"))]
    assert sorted(named) == sorted(ast.literal_eval(maps))


def texts_of(node):
    """The text of an expression, with None where a value is put in; None for an expression that is no text of the source."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part.value if isinstance(part, ast.Constant) else None for part in node.values]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = texts_of(node.left), texts_of(node.right)
        return left + right if left and right else None
    return None


def logged():
    """A pattern for each message of the log: what is fixed in it, without the key=value pairs at its end."""
    prefixes = {name: ["directory: realm '", None, "': "] for name in ("message", "failure")}
    for node in ast.walk(program("mailcloak.py")):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if (
            isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "log"
            and name in ("debug", "info", "warning", "error", "log")
        ):
            parts = texts_of(node.args[name == "log"])
            parts = [part or None for part in re.split(r"%\.?\d*[a-z]", "".join(parts))] if parts else None
            parts = [each for part in parts for each in (part, None)][:-1] if parts else None
        elif name in ("message", "failure", "StartError"):
            parts = texts_of(node.args[0])
            parts = prefixes.get(name, []) + parts + ([", host ", None] if name == "failure" else []) if parts else None
        else:
            continue
        if not parts or not any(parts):
            continue
        pattern = "".join(".+" if part is None else re.escape(part) for part in parts)
        pattern = re.sub(r"(\\ [a-z_]+=(\.\+)*)+$", "", pattern).replace("(\\.\\+)+", ".+")
        yield re.sub(r"(\.\+)+", ".+", pattern)


def heads_of_messages():
    heads = [
        head for head, _ in items(PAGES["mailcloak.8"].read_text(encoding="utf-8").partition(".Sh DIAGNOSTICS")[2].splitlines())
    ]
    return [re.sub(r"( [a-z_]+=\S*)+$| \.\.\.$", "", head) for head in heads]


MESSAGES = sorted(set(logged()))


def test_messages_of_the_program_are_found():
    assert len(MESSAGES) > 60
    assert any("token" in pattern for pattern in MESSAGES)


@pytest.mark.parametrize("pattern", MESSAGES, ids=lambda pattern: "-".join(re.findall(r"\w{2,}", pattern))[:60])
def test_message_of_the_log_is_in_the_table(pattern):
    assert any(re.fullmatch(f"{pattern}(, .+)?", head) for head in heads_of_messages()), f"mailcloak(8) does not explain: {pattern}"


def test_every_reason_is_there_with_the_sentence_of_the_program():
    said = {
        head: " ".join(line for line in body if not line.startswith("."))
        for head, body in items(whole_section("mailcloak.8", "REASONS"))
    }
    assert said == {word: reason.rule for word, reason in mailcloak.REASONS.items()}


# ---- mailcloak.yaml(5)


def keys():
    """Each key of the page with the text below it."""
    found = items(PAGES["mailcloak.yaml.5"].read_text(encoding="utf-8").partition(".Sh FILES")[0].splitlines())
    return {head: body for head, body in found if re.fullmatch(r"\w+\.\w+|static_users", head)}


def test_every_key_is_there_and_no_other():
    assert sorted(keys()) == sorted([*KEYS, "static_users"])


@pytest.mark.parametrize("key", KEYS)
def test_key_has_its_default_its_unit_and_an_example_that_is_good(key):
    block, name = key.split(".")
    body = "\n".join(keys()[key])
    default = default_of(block, name)
    if default is dataclasses.MISSING or name.startswith("client_secret"):
        assert re.search(r"^Required[.,]", body, re.MULTILINE)
    else:
        shown = (
            "(empty|none)"
            if default in ("", ())
            else re.escape(str(default).lower() if isinstance(default, bool) else str(default))
        )
        assert re.search(rf"^Default: {shown}[.,]", body, re.MULTILINE), default
        if isinstance(default, (int, float)):
            assert re.search(r"^Unit: ", body, re.MULTILINE)
    (example,) = re.findall(r"^Example:\n\.Dl (.*)$", body, re.MULTILINE)
    ((example_name, value),) = yaml.safe_load(plain(example)).items()
    assert example_name == name
    read = BLOCKS[block].__dataclass_fields__[name].metadata["read"](value)
    assert read != default, "an example that changes nothing"


@pytest.mark.parametrize("key", ["keycloak_failure_mode", "unauthenticated_local_sender", "foreign_sender", "log", "log_level"])
def test_every_choice_of_a_key_is_there(key):
    block = "daemon" if key.startswith("log") else "policy"
    with pytest.raises(ValueError, match="expected one of") as caught:
        BLOCKS[block].__dataclass_fields__[key].metadata["read"]("no such choice")
    body = [plain(line) for line in keys()[f"{block}.{key}"] if line.startswith(".Cm")]
    named = {line.split()[0] for line in body}
    assert named == set(caught.value.args[0].removeprefix("expected one of ").split(", "))


def test_example_of_a_whole_file_is_good(tmp_path, monkeypatch):
    text = re.search(
        r"^\.Bd -literal[^\n]*\n(.*?)^\.Ed", "\n".join(section("mailcloak.yaml.5", "EXAMPLES")) + "\n", re.MULTILINE | re.DOTALL
    )[1]
    config = yaml.safe_load(text)
    secret = tmp_path / "client_secret"
    secret.write_text("x\n")
    config["keycloak"]["client_secret_file"] = str(secret)
    config["sockets"].update(socket_owner_user="", socket_owner_group="")
    config["daemon"] = {"user": ""}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert mailcloak.load_config(str(path)).policy.recipient_delimiter == "+"


# ---- mailcloakctl(8)


def commands():
    """Each command of the page: (head, body)."""
    found = {}
    for title in ("Aliases", "Apps", "The database", "The running daemon", "The installation"):
        for head, body in items(section("mailcloakctl.8", title)):
            words = head.split()
            depth = 2 if words[0] in {command.split()[0] for command in COMMANDS if " " in command} else 1
            found[" ".join(words[:depth])] = (head, body)
    return found


def test_every_command_is_there_and_no_other():
    assert sorted(commands()) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_its_arguments_and_options(command):
    head, _ = commands()[command]
    parser = COMMANDS[command]
    options = {option for action in parser._actions for option in action.option_strings}
    assert options_in(head) == options - COMMON
    names = [
        action.metavar for action in parser._actions if action.metavar and action.option_strings[:1] not in (["--config"], ["--db"])
    ]
    assert sorted(re.findall(r"(?<![\w-])[A-Z][A-Z_]*\b", head)) == sorted(names)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_an_example_that_parses(command):
    _, body = commands()[command]
    examples = [plain(line[len(".Dl ") :]) for line in body if line.startswith(".Dl ")]
    assert len(examples) == 1
    words = examples[0].split()
    assert words[0] == "mailcloakctl"
    options = mailcloakctl.build_parser().parse_args(words[1:], argparse.Namespace(config=None, db=None, json=False))
    assert f"{options.noun} {options.verb or ''}".strip() == command


def test_every_option_of_all_commands_is_there():
    heads = " ".join(head for head, _ in items(section("mailcloakctl.8", "DESCRIPTION")))
    assert options_in(heads) == COMMON | {"--version"}
    assert options_in(" ".join(map(plain, section("mailcloakctl.8", "SYNOPSIS")))) == COMMON - {"-h"} | {"--version"}


def test_other_examples_parse():
    found = re.findall(
        r"(?:^# |\| |^)mailcloakctl (.*?)(?: >.*)?$", "\n".join(map(plain, section("mailcloakctl.8", "EXAMPLES"))), re.MULTILINE
    )
    assert len(found) >= 4
    for example in found:
        mailcloakctl.build_parser().parse_args(example.split(), argparse.Namespace(config=None, db=None, json=False))


def test_exit_codes_are_those_of_the_program():
    assert [head for head, _ in items(section("mailcloakctl.8", "EXIT STATUS"))] == ["0", "1", "2", "3"]
    codes = {int(code) for code in re.findall(r"(?<![\w-])(\d)(?= (?:done|refused|usage|a safety))", mailcloakctl.__doc__)}
    assert codes == {0, 1, 2, 3}
