"""Finds and reads the small JSON files that describe a checkpoint, beside its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perception_rt.checkpoint.git_lfs import refuse_pointer
from perception_rt.errors import CheckpointError, InputError
from perception_rt.records import check_value

ORIGINAL_FOLDER = "original"  # Meta's own files in a hub snapshot
MAX_JSON_BYTES = 1024 * 1024
_REQUIRED = object()


def folder_of(path: Path) -> Path:
    """The folder at a path, or the one that holds the file."""
    try:
        return path if path.is_dir() else path.parent
    except OSError:  # a name too long for any file, which opening the weights reports
        return path.parent


def find_beside(path: Path, name: str) -> Path | None:
    """Finds a file by name in the folder of the weights, or in its `original/`."""
    directory = folder_of(path)
    candidates = (directory / name, directory / ORIGINAL_FOLDER / name)
    return next((file for file in candidates if file.is_file()), None)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Reads a JSON file of at most `limit` bytes; CheckpointError if it is not readable."""
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path.name} is larger than the limit of {limit} bytes")
        refuse_pointer(path)
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not a readable JSON file") from error


class Section:
    """An object of a JSON file. Reads its fields by type, and names file and field in errors.

    Args:
        file: name of the file.
        content: value in the file, which must be an object.
        within: dotted name of the object in the file; empty for the whole file.

    Raises:
        InputError: the value is not an object.
    """

    def __init__(self, file: str, content: Any, within: str = "") -> None:
        if not isinstance(content, Mapping):
            where = f"{file}: {within}" if within else file
            raise InputError(f"{where} must be an object, not {type(content).__name__}")
        self.file = file
        self.content: Mapping[str, Any] = content
        self._prefix = f"{within}." if within else ""

    def __contains__(self, name: str) -> bool:
        """Whether the file gives a field a value other than null."""
        return self.content.get(name) is not None

    def name(self, field: str) -> str:
        """Dotted name of a field, for messages."""
        return self._prefix + field

    def error(self, text: str) -> InputError:
        """An InputError that names the file."""
        return InputError(f"{self.file}: {text}")

    def missing(self, field: str) -> InputError:
        """The error for a field that is neither in the file nor elsewhere."""
        return self.error(f"{self.name(field)} is missing")

    def read(self, field: str, declared: Any, default: Any = _REQUIRED) -> Any:
        """Returns a field's value.

        Args:
            field: name of the field.
            declared: its type, as for `records.check_value`.
            default: value if the field is absent or null; without one, it is required.

        Raises:
            InputError: the field is missing, or has another type.
        """
        value = self.content.get(field)
        if value is None:
            if default is _REQUIRED:
                raise self.missing(field)
            return default
        return check_value(f"{self.file}: {self.name(field)}", value, declared)

    def section(self, field: str, default: Any = _REQUIRED) -> "Section":
        """Returns an object within this one; errors as `read`."""
        value = self.content.get(field)
        if value is None:
            if default is _REQUIRED:
                raise self.missing(field)
            value = default
        return Section(self.file, value, self.name(field))

    def require(self, field: str, only: Any) -> None:
        """InputError unless a field is absent, null, or the only value that is supported."""
        value = self.content.get(field)
        if value is not None and value != only:
            raise self.error(f"{self.name(field)} is {value!r:.60}; only {only!r} is supported")
