"""Checks the output of a command that fails."""

from collections.abc import Callable
from typing import Any

from perception_rt.cli import export_main


def fails(
    capsys: Any, arguments: list[str], message: str, run: Callable[..., int] = export_main
) -> str:
    """Asserts status 2, no standard output, and one line besides progress on standard error.

    Returns:
        The line.
    """
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if " s  " not in line]
    assert len(lines) == 1, captured.err
    assert message in lines[0]
    return lines[0]
