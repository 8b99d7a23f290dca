"""Size, names and characters of the sources; the line budget of each package is printed."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("perception_rt", "training", "benchmarks", "examples")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
# A file with such a name has no subject, so it gathers everything.
BANNED_NAMES = ("util", "utils", "helper", "helpers", "common", "misc", "manager", "base")

SOURCES = sorted(p for top in PACKAGES for p in (ROOT / top).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


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
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_sources_are_ascii() -> None:
    # Tests may hold texts of other scripts, as data.
    assert [relative(p) for p in SOURCES if not p.read_bytes().isascii()] == []


def test_every_module_says_what_it_is() -> None:
    assert [relative(p) for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_no_file_is_named_after_nothing() -> None:
    named = [p for p in SOURCES + TESTS if p.stem.strip("_") in BANNED_NAMES]
    named += [p for p in SOURCES if p.parent.name in BANNED_NAMES]
    assert [relative(p) for p in named] == []


def test_test_files_have_distinct_names() -> None:
    # Without packages, pytest imports test modules by their bare names.
    counts = Counter(p.name for p in TESTS if p.name != "conftest.py")
    assert [name for name, count in counts.items() if count > 1] == []


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
