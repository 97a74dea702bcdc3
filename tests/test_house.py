"""The house: what STYLE asks of the one file can be read off it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import gateway as g

SOURCE = Path(g.__file__).read_text()
TREE = ast.parse(SOURCE)


def test_the_banners_match_the_map():
    """
    The first page names the floors and sections that the file has, in their order.
    """
    mapped = re.findall(r"^ {4}(?:([A-E])\. (\w+)$| ?(\d+)\. (\S.*?)  +(\S.*)$)", g.__doc__, re.MULTILINE)
    banners = re.findall(r"^# (?:=== Floor ([A-E])\. (\w+): .* =+|--- (\d+)\. (.*?): (.*) -+)$", SOURCE, re.MULTILINE)

    assert banners == mapped
    numbers = [int(number) for _, _, number, _, _ in banners if number]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [floor for floor, *_ in banners if floor] == list("ABCDE")


def test_no_name_is_used_above_its_definition():
    """
    Each section knows only what stands above it (annotations, which nobody runs, excepted).
    """
    defined = {name: node.lineno for node in TREE.body for name in names_of(node)}
    uses = [(use.id, use.lineno) for use in runtime_names(TREE) if use.id in defined]

    assert [(name, line) for name, line in uses if line < defined[name]] == []


def test_no_name_is_defined_twice():
    """
    The second one would take the place of the first without a word.
    """
    names = [name for node in TREE.body for name in names_of(node)]

    assert [name for name in set(names) if names.count(name) > 1] == []


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement of the module defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def runtime_names(node: ast.AST) -> list[ast.Name]:
    """Every name that is read when the code runs."""
    skipped = {"annotation", "returns"}
    found = [node] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else []
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        if field not in skipped:
            for child in children:
                if isinstance(child, ast.AST):
                    found += runtime_names(child)
    return found


def test_nothing_mutable_is_shared_by_the_module():
    """
    State has one owner: there is no `global`, and no import reaches into this repository.
    """
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)] == []


def test_every_public_thing_promises_something():
    """
    Public classes, and public functions at the top, have a docstring.
    """
    public = [node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]

    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_the_gauges(capsys):
    """
    STYLE's gauges, to look at: lengths of functions and classes, broad excepts.
    """
    functions = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = sorted((node.end_lineno - node.lineno + 1, node.name) for node in functions)
    classes = sorted((n.end_lineno - n.lineno + 1, n.name) for n in ast.walk(TREE) if isinstance(n, ast.ClassDef))
    with capsys.disabled():
        print(f"\n{len(SOURCE.splitlines())} lines, {len(lengths)} functions,", end=" ")
        print(f"95th percentile {lengths[int(len(lengths) * 0.95)][0]}, longest {lengths[-3:]}, classes {classes[-3:]}")

    assert lengths
