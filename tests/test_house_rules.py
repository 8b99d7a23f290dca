"""Sizes, names and characters of sources and documents; prints the lines of each package."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("perception_rt", "training", "benchmarks", "examples")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_COLUMNS = 100
# Modules at the top of a folder; what belongs together has a folder of its own.
MAX_MODULES = {
    "training": 16,
    "perception_rt/evaluation": 4,
    "perception_rt/runtime": 9,
    "perception_rt/export": 8,
}
# A file with such a name has no subject, so it gathers everything.
BANNED_NAMES = ("util", "utils", "helper", "helpers", "common", "misc", "manager", "base")

SOURCES = sorted(p for top in PACKAGES for p in (ROOT / top).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_files_are_at_most_500_lines() -> None:
    assert [
        f"{relative(p)}: {lines(p)}" for p in SOURCES + TESTS if lines(p) > MAX_FILE_LINES
    ] == []


def test_functions_are_at_most_80_lines() -> None:
    long = [
        f"{relative(path)}: {node.name} has {size}"
        for path in SOURCES + TESTS
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_documents_are_at_most_100_columns_wide() -> None:
    """Rows of tables, and words that cannot be broken, may be longer."""
    wide = [
        f"{relative(path)}:{number} has {len(line)} columns"
        for path in DOCUMENTS
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if len(line) > MAX_COLUMNS and not line.startswith("|") and " " in line.strip()
    ]
    assert wide == []


def test_sources_are_ascii() -> None:
    # Tests hold texts in other scripts as data.
    assert [relative(p) for p in SOURCES if not p.read_bytes().isascii()] == []


@pytest.mark.parametrize(("folder", "most"), MAX_MODULES.items())
def test_folders_have_few_modules_at_the_top(folder: str, most: int) -> None:
    assert len(list((ROOT / folder).glob("*.py"))) <= most


def test_every_module_has_a_docstring() -> None:
    assert [relative(p) for p in SOURCES if not ast.get_docstring(parsed(p))] == []


def test_file_names_have_a_subject() -> None:
    named = [p for p in SOURCES + TESTS if p.stem.strip("_") in BANNED_NAMES]
    named += [p for p in SOURCES if p.parent.name in BANNED_NAMES]
    assert [relative(p) for p in named] == []


def test_test_files_have_distinct_names() -> None:
    # Without packages, pytest imports test modules by their bare names.
    counts = Counter(p.name for p in TESTS if p.name != "conftest.py")
    assert [name for name, count in counts.items() if count > 1] == []


def is_private(name: str) -> bool:
    """Whether only its own file may use a name; `_repr_html_` and the like are protocols."""
    return name.startswith("_") and not name.endswith("_")


def defined(tree: ast.AST) -> set[str]:
    """Private functions, classes, variables and attributes that a file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of attributes and imports, also of those in strings: code, and `setattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"(?:\.|import )(_[a-zA-Z]\w*)", node.value)
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            named = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from ((node.lineno, name) for name in named if isinstance(name, str))


def test_tests_and_benchmarks_use_no_private_names() -> None:
    trees = {path: parsed(path) for path in SOURCES + TESTS}
    private = set.union(*map(defined, trees.values()))
    found = []
    for path, tree in trees.items():
        if path in TESTS or path.relative_to(ROOT).parts[0] in ("benchmarks", "examples"):
            others = private - defined(tree)
            found += [f"{relative(path)}:{line} {n}" for line, n in used(tree) if n in others]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "plm._unknown_name",
        "from perception_rt.runtime.session import _unknown_name",
        "monkeypatch.setattr(session, '_unknown_name', None)",
        "monkeypatch.setattr('perception_rt.runtime.session._unknown_name', None)",
        "CHILD = 'print(plm._unknown_name.jobs)'",
    ],
)
def test_private_names_are_found(code: str) -> None:
    assert "_unknown_name" in [name for _, name in used(ast.parse(code))]


def test_line_budget(capsys: pytest.CaptureFixture[str]) -> None:
    budget: Counter[str] = Counter()
    for path in SOURCES + TESTS:
        folders = path.relative_to(ROOT).parts[:-1]
        budget["/".join(folders[: 2 if folders[0] == "perception_rt" else 1])] += lines(path)
    with capsys.disabled():
        print("\nlines of Python, comments and all:")
        for name, count in budget.items():
            print(f"  {name:28}{count:7,}")
    assert set(PACKAGES) & set(budget) >= {"perception_rt", "training"}
