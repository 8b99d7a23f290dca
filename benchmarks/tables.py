"""Markdown that the benchmark reports share: tables, limits, and what was unavailable."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GIGA = 1e9
MIB = 1024 * 1024

_RATES = ("fp32", "bf16", "int8")


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], unavailable: Mapping[str, str]
) -> list[str]:
    """Lines of a table.

    Args:
        columns: headings; the first column holds the names of the rows.
        rows: cells of each row.
        unavailable: reasons by name of the rows without figures, which come last.
    """
    blank = ["-"] * (len(columns) - 2)
    reasons = ([name, f"unavailable: {why}", *blank] for name, why in unavailable.items())
    return [
        f"| {' | '.join(columns)} |",
        f"|---{'|---:' * (len(columns) - 1)}|",
        *(f"| {' | '.join(map(_cell, row))} |" for row in (*rows, *reasons)),
    ]


def limit_lines(result: Mapping[str, Any]) -> list[str]:
    """The measured limits of a result, and a line for each one that is unavailable."""
    limits, reasons = result["limits"], result["unavailable_limits"]
    trial = " (a quick trial: small operands)" if result["settings"]["quick"] else ""
    rates = ", ".join(f"{name} {_rate(limits, name, ',.0f')}" for name in _RATES)
    read = _rate(limits, "read", ".1f")
    return [
        f"measured limits{trial}: {rates} GFLOP/s; read {read} GB/s  ",
        *(f"unavailable limit: {name}: {why}  " for name, why in reasons.items()),
    ]


def share(record: Mapping[str, Any], name: str, limit: str = "") -> str:
    """A share in percent and the name of its limit, or a dash if the record has no such share."""
    return f"{record[name]:.0%} {limit}".rstrip() if name in record else "-"


def _rate(limits: Mapping[str, float], name: str, form: str) -> str:
    return format(limits[name] / GIGA, form) if name in limits else "unavailable"


def _cell(text: str) -> str:
    """The text with bars escaped, which would begin a cell."""
    return text.replace("|", "\\|")
