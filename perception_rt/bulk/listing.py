"""The numbered items of a job, kept in an anonymous file so that memory does not grow with them."""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias, get_args

Kind: TypeAlias = Literal["image", "text", "video"]
Form: TypeAlias = Literal["file", "span", "json", "cell", "inline", "missing"]

KINDS: tuple[Kind, ...] = get_args(Kind)
FORMS: tuple[Form, ...] = get_args(Form)
_STRIDE = 256  # items between two remembered offsets


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to embed.

    Attributes:
        kind: which tower embeds it.
        source: its name in the result: a path, `shard.tar#member`, `file.parquet#row`,
            `texts.txt#line`, or a text of the command line.
        form: where its content is: a whole "file", a "span" of bytes of a file, a "json" line, a
            "cell" of a Parquet file, or "inline" in `source`; "missing" has none.
        path: the file; empty if it is `source`.
        offset: first byte of a span, or row of a cell.
        size: bytes of a span.
    """

    kind: Kind
    source: str
    form: Form = "file"
    path: str = ""
    offset: int = 0
    size: int = 0

    @property
    def file(self) -> str:
        """Path of the file that has the content."""
        return self.path or self.source


class Listing:
    """Items by number, from 0, and a digest of them all.

    Use it as a context manager. The file has no name, so that a killed process leaves none.

    Args:
        items: taken once, in order.
        folder: where the file is, about 100 bytes per item; None for the temporary folder.
    """

    def __init__(self, items: Iterable[Item], folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._offsets = array("q")
        self._count = 0
        digest = hashlib.sha256()
        try:
            for item in items:
                if self._count % _STRIDE == 0:
                    self._offsets.append(self._file.tell())
                line = _encode(item)
                digest.update(line)
                self._file.write(line)
                self._count += 1
            self._file.flush()
        except OSError as error:  # a full disk, which names no file
            error.filename = error.filename or str(folder or tempfile.gettempdir())
            self._discard()
            raise
        except BaseException:
            self._discard()
            raise
        self.digest = f"sha256:{digest.hexdigest()}"

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> list[Item]:
        """Returns the items of some numbers."""
        stop = min(stop, self._count)
        if start >= stop:
            return []
        self._file.seek(self._offsets[start // _STRIDE])
        for _ in range(start % _STRIDE):
            self._file.readline()
        return [_decode(self._file.readline()) for _ in range(start, stop)]

    def close(self) -> None:
        """Removes the file."""
        self._file.close()

    def _discard(self) -> None:
        with suppress(OSError):  # what is not written yet cannot be written
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _encode(item: Item) -> bytes:
    fields = [
        KINDS.index(item.kind), FORMS.index(item.form), item.source, item.path, item.offset,
        item.size,
    ]  # fmt: skip
    return json.dumps(fields, separators=(",", ":")).encode("ascii") + b"\n"


def _decode(line: bytes) -> Item:
    kind, form, source, path, offset, size = json.loads(line)
    return Item(KINDS[kind], source, FORMS[form], path, offset, size)
