"""The house: what STYLE asks of the one file can be read off it."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import gateway as g

SOURCE = Path(g.__file__).read_text()
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# --- \d+\. (.*?): .* -+\n(?:\n?# Offers: ((?:.+\n)(?:#   .+\n)*))?", re.MULTILINE)
BUDGETS = {
    "Words": 456,
    "Secrets": 264,
    "Prices": 323,
    "Types": 429,
    "Settings": 295,
    "Config": 795,
    "Editing": 265,
    "Ledger": 800,
    "Counters": 320,
    "Index": 820,
    "Waiting": 127,
    "Limits": 730,
    "Wire": 340,
    "Requests": 815,
    "Formats": 790,
    "Dialects": 200,
    "Connections": 500,
    "Upstreams": 798,
    "Demo": 100,
    "Attempts": 410,
    "Relay": 570,
    "Events": 320,
    "Metrics": 214,
    "Models": 140,
    "Gateway": 495,
    "Actions": 547,
    "Reconcile": 192,
    "Backup": 162,
    "Integrity": 132,
    "Front door": 800,
    "API": 280,
    "Local door": 260,
    "Server": 420,
    "Command line": 898,
}


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


@functools.cache
def sections() -> dict[str, range]:
    """Map each section to its lines in the file."""
    starts = [(match[1], SOURCE.count("\n", 0, match.start()) + 1) for match in BANNER.finditer(SOURCE)]
    ends = [line for _, line in starts[1:]] + [len(SOURCE.splitlines()) + 1]
    return {name: range(line, end) for (name, line), end in zip(starts, ends, strict=True)}


def section_of(line: int) -> str:
    """Name the section that a line belongs to; "" for the first page."""
    return next((name for name, lines in sections().items() if line in lines), "")


def global_names(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[str]:
    """List the names that `node` takes from the module, in annotations too; a function hides what it binds itself."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        bound = {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
        names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
        hidden |= bound | {each.id for each in names if not isinstance(each.ctx, ast.Load)}
    if isinstance(node, ast.Name) and node.id not in hidden:
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from global_names(child, hidden)


def crossing_names() -> dict[str, set[str]]:
    """List for each section which of its names other sections use."""
    home = {name: section_of(node.lineno) for node in TREE.body for name in names_of(node)}
    crossing: dict[str, set[str]] = {}
    for node in TREE.body:
        user = section_of(node.lineno)
        for name in global_names(node):
            if home.get(name, user) not in ("", user):
                crossing.setdefault(home[name], set()).add(name)
    return crossing


def test_only_what_a_section_offers_crosses_its_border():
    """
    The comment below a banner lists every name that other sections use, and no other.
    """
    offered = {match[1]: set(re.findall(r"\w+", match[2] or "")) for match in BANNER.finditer(SOURCE)}
    crossing = crossing_names()

    assert {name: sorted(names) for name, names in offered.items()} == {
        name: sorted(crossing.get(name, ())) for name in offered
    }


def test_sections_keep_their_budgets(capsys):
    """
    Budgets are ceilings in lines: a section that passes its own is redrawn, not stretched.
    """
    lengths = {name: len(lines) for name, lines in sections().items()}
    with capsys.disabled():
        print()
        for name, length in lengths.items():
            print(f"  {name:14} {length:5} of {BUDGETS[name]:5}")

    assert [name for name, length in lengths.items() if length > BUDGETS[name]] == []


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
    """List the names that a statement of the module defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


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
