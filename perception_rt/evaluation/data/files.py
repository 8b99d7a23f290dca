"""Reads small files of a data set: lists of names, tables and lines of JSON."""

import csv
import json
from collections.abc import Iterator
from io import StringIO
from typing import Any

from perception_rt.errors import InputError
from perception_rt.processing.files import open_regular_file, path_name

_MAX_BYTES = 256 * 1024 * 1024


def read_text(path: str, kind: str) -> str:
    """Content of a text file.

    Args:
        path: the file.
        kind: noun for errors, such as "class file".

    Raises:
        InputError: it is missing, larger than 256 MiB, or not UTF-8.
    """
    path, name = path_name(path, kind)
    with open_regular_file(path, name) as file:
        try:
            data = bytearray()
            while len(data) <= _MAX_BYTES and (more := file.read(_MAX_BYTES + 1 - len(data))):
                data += more
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{name} has more than {_MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8") from None


def read_names(path: str, kind: str) -> list[str]:
    """Strings of a file: one per line that is not blank, or a JSON list of strings.

    Raises:
        InputError: the file is unusable, or has no string.
    """
    text = read_text(path, kind)
    if path.lower().endswith(".json"):
        names = _json(text, f"{kind} {path!r:.200}")
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise InputError(f"{kind} {path!r:.200} must have strings: one per line, or a JSON list")
    return names


def read_table(path: str, columns: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line number and values of each row of a CSV file that begins with the names of its columns.

    Raises:
        InputError: the file is unusable, or a column or a value is missing.
    """
    name = f"table {path!r:.200}"
    reader = csv.DictReader(StringIO(read_text(path, "table")), restval="")
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{name} has no column {missing[0]!r}; it needs {','.join(columns)}")
        for row in reader:
            values = tuple(row[column].strip() for column in columns)
            if "" in values:
                absent = columns[values.index("")]
                raise InputError(f"line {reader.line_num} of {name} has no {absent}")
            yield reader.line_num, values
    except csv.Error as error:
        raise InputError(f"line {reader.line_num} of {name} is no CSV: {error}") from None


def read_records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a JSON-lines file.

    Raises:
        InputError: the file is unusable, or a line is not a JSON object.
    """
    for number, line in enumerate(read_text(path, "data file").split("\n"), 1):
        if line.strip():
            name = f"line {number} of {path!r:.200}"
            record = _json(line, name)
            if not isinstance(record, dict):
                raise InputError(f"{name} is not a JSON object")
            yield number, record


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{name} is not JSON") from None
