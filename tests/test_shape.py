"""How the programs are laid out: what a reader from the top may rely on."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import MODULES, ROOT

import mailcloak

SECTIONS = (
    "Constants, errors, text for the log",
    "Addresses",
    "Decisions",
    "Wire protocols",
    "Config",
    "Database",
    "Keycloak",
    "Directory",
    "Answers",
    "Servers",
    "Process",
    "main",
)
LONGEST_FUNCTION = 60
LONGEST_FILES = {"mailcloakctl.py": 1500, "mailcloakdoctor.py": 1450}
DECISION_BEFORE_LINE = 700


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def banners(source):
    """(line, number, title) of each section."""
    lines = source.splitlines()
    found = []
    for index, line in enumerate(lines):
        match = re.fullmatch(r"# (\d+)\. (.+)", line)
        if match and lines[index - 1].startswith("# ----"):
            found.append((index + 1, int(match[1]), match[2]))
    return found


def defined_names(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}


class UsedNames(ast.NodeVisitor):
    """Names that are evaluated when the program runs: annotations are not."""

    def __init__(self):
        self.names = {}

    def visit_Name(self, node):
        self.names.setdefault(node.id, node.lineno)

    def visit_arg(self, node):
        pass

    def visit_AnnAssign(self, node):
        self.visit(node.target)
        if node.value:
            self.visit(node.value)

    def visit_FunctionDef(self, node):
        for each in (*node.decorator_list, node.args, *node.body):
            self.visit(each)


def names_from_below(source):
    """Where a section uses a name that only a later section defines."""
    places = banners(source)
    section_of = {}
    uses = []
    for node in ast.parse(source).body:
        section = max((number for line, number, _ in places if line < node.lineno), default=0)
        for name in defined_names(node):
            section_of[name] = section
        used = UsedNames()
        used.visit(node)
        uses += [(section, name, line) for name, line in used.names.items()]
    return [
        f"line {line}: section {section} uses {name} of section {section_of[name]}"
        for section, name, line in uses
        if section_of.get(name, 0) > section
    ]


def test_sections_stand_in_the_order_of_a_reader_and_in_the_table_of_contents():
    source = read("mailcloak.py")
    assert [(number, title) for _, number, title in banners(source)] == list(enumerate(SECTIONS, 1))
    contents = ast.get_docstring(ast.parse(source))
    assert re.findall(r"^ +(\d\d?) (.+?)  ", contents, re.MULTILINE) == [
        (str(number), title) for number, title in enumerate(SECTIONS, 1)
    ]


def test_section_uses_names_of_the_sections_above_alone():
    assert names_from_below(read("mailcloak.py")) == []


def test_name_of_a_later_section_is_noticed():
    rule = "# ----\n"
    source = f"{rule}# 1. One\n{rule}def f(x: later):\n    return later\n{rule}# 2. Two\n{rule}later = 1\n"
    assert names_from_below(source) == ["line 5: section 1 uses later of section 2"]


def test_decision_stands_before_all_machinery():
    tree = ast.parse(read("mailcloak.py"))
    line = next(node.lineno for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "decide_policy")
    assert line < DECISION_BEFORE_LINE


@pytest.mark.parametrize("name", MODULES)
def test_no_function_is_too_long_to_be_seen_at_once(name):
    functions = [node for node in ast.walk(ast.parse(read(name))) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= LONGEST_FUNCTION] == []


@pytest.mark.parametrize("name", LONGEST_FILES)
def test_file_is_not_too_long_to_be_known(name):
    assert len(read(name).splitlines()) <= LONGEST_FILES[name]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_says_what_it_is(name):
    nodes = [node for node in ast.parse(read(name)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [node.name for node in nodes if not node.name.startswith("_") and not ast.get_docstring(node)] == []


def answers_of(tree):
    """The reason in each call of Action and accept, as a node of the syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Action", "accept"):
            yield node.args[1 if node.func.id == "Action" else 0]


def test_each_reason_is_a_literal_at_the_decision_and_has_its_sentence():
    tree = ast.parse(read("mailcloak.py"))
    table = next(node for node in tree.body if "REASONS" in defined_names(node))
    in_table = {id(each) for each in ast.walk(table)}
    elsewhere = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in in_table}
    given = {reason.value for reason in answers_of(tree) if isinstance(reason, ast.Constant)} | set(mailcloak.UNKNOWN)
    assert given <= set(mailcloak.REASONS) <= elsewhere
    composed = [ast.unparse(reason) for reason in answers_of(tree) if isinstance(reason, ast.JoinedStr)]
    assert composed == ["f'{recipient.reason},{sender.reason}'"]  # of two literals, which the log shows with a comma
