"""Writes the files of a run atomically: a reader sees the whole file or the one before it.

Holds the names that several modules share. Uses the standard library alone, so `plot.py` starts
without torch.
"""

import os
from pathlib import Path

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a binary file atomically: to a temporary file beside `path`, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
