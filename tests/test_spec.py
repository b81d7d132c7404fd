"""SPEC.md, the tests and the message table agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import wire

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("claudemesh", "broker", "wire", "store", "cron")
SPEC = (ROOT / "SPEC.md").read_text()


def declared() -> list[str]:
    """The ids of the rules: bold at the beginning of a paragraph, or in the middle of one."""
    return re.findall(r"\*\*([A-Z]+-\d+)\*\*", SPEC.replace("such as **DELIV-7**", ""))


def marked() -> dict[str, set[str]]:
    """The ids that tests carry, with the files they stand in."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "spec":
                for id in _ids(node, tree):
                    found.setdefault(id, set()).add(path.name)
    return found


def _ids(call: ast.Call, tree: ast.Module) -> list[str]:
    """The ids in one marker; where a loop variable stands for them, those in the table it runs over."""
    if all(isinstance(argument, ast.Constant) for argument in call.args):
        return [argument.value for argument in call.args]
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.ListComp) and call in ast.walk(node))
    return re.findall(r"'([A-Z]+-\d+)'", ast.unparse(loop.generators[0].iter))


def test_every_rule_is_declared_once():
    ids = declared()
    assert len(ids) > 200
    assert [id for id in sorted(set(ids)) if ids.count(id) > 1] == []


def test_every_rule_has_a_test_and_every_test_a_rule():
    ids, tests = set(declared()), set(marked())
    assert sorted(ids - tests) == [], "rules without a test"
    assert sorted(tests - ids) == [], "tests of rules that do not exist"


def test_every_rule_stands_beside_the_code_that_enforces_it():
    code = "".join((ROOT / f"{name}.py").read_text() for name in MODULES)
    named = set(re.findall(r"\b([A-Z]+-\d+)\b", code))
    for prefix, first, last in re.findall(r"\b([A-Z]+)-(\d+) to (?:[A-Z]+-)?(\d+)\b", code):
        named |= {f"{prefix}-{number}" for number in range(int(first), int(last) + 1)}
    assert sorted(set(declared()) - named) == []


def test_every_id_named_in_the_code_is_a_rule():
    ids = set(declared())
    prefixes = {id.partition("-")[0] for id in ids}
    for name in MODULES:
        named = set(re.findall(r"\b([A-Z]+-\d+)\b", (ROOT / f"{name}.py").read_text()))
        assert {id for id in named if id.partition("-")[0] in prefixes} - ids == set(), name


def test_the_reference_is_the_table():
    printed = SPEC.partition("<!-- tables -->\n")[2].partition("<!-- end of tables -->")[0]
    assert printed == wire.tables(), "run: python wire.py --tables"


def test_every_error_code_of_the_broker_is_documented():
    raised = set(re.findall(r'Refused\("(\w+)"', (ROOT / "broker.py").read_text() + (ROOT / "wire.py").read_text()))
    assert raised - set(wire.ERRORS) == set()
