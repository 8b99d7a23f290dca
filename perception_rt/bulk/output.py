"""The files of a job under way: which shards are missing, and what is made of them at the end.

A folder OUT holds its shards, `job.json` and `errors.jsonl`. A single-file OUT has its shards in
`OUT.parts` until it is assembled.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from perception_rt.bulk.atomic import TEMPORARY, remove_leftovers, replacing, write_bytes
from perception_rt.bulk.parquet import pyarrow
from perception_rt.bulk.result import SUFFIXES, open_result, result_paths, write_result
from perception_rt.bulk.shards import (
    NumpyShards,
    ParquetShards,
    Shard,
    ShardFormat,
    ShardHead,
)
from perception_rt.errors import InputError

JOB_FILE = "job.json"
SHARD_ITEMS = 1024  # by default
_VERSION = 1
_LOCK_TRIES, _LOCK_WAIT_S = 50, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that decides the rows of a result. Jobs that are equal give the same files.

    Attributes:
        package: id of the package.
        model: name of its model.
        dim: channels of a row.
        dtype: data type of the rows on disk, "float32" or "float16".
        items: number of items.
        sources: digest of the items.
        shard_items: items per shard.
        batch_size: items per engine call.
        num_frames: frames per video.
        preprocessing: further settings of images and texts.
    """

    package: str
    model: str
    dim: int
    dtype: str
    items: int
    sources: str
    shard_items: int
    batch_size: int
    num_frames: int
    preprocessing: str = ""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.items // self.shard_items)

    @property
    def origin(self) -> dict[str, Any]:
        """Facts that each file records."""
        return {"package": self.package, "model": self.model, "dim": self.dim, "dtype": self.dtype}

    def items_of(self, shard: int) -> tuple[int, int]:
        """First item of a shard, and the item after its last."""
        start = shard * self.shard_items
        return start, min(start + self.shard_items, self.items)

    def part(self, part: tuple[int, int]) -> range:
        """Shards of part i of n, counted from 1."""
        number, parts = part
        return range(self.shards * (number - 1) // parts, self.shards * number // parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts of a job's items.

    Attributes:
        items: items of the shards that exist.
        rows: items with a row.
        errors: items without.
    """

    items: int
    rows: int
    errors: int


def output_kind(out: Path, text: str) -> str:
    """Suffix of a single-file result, or "" for a folder; InputError for another suffix."""
    if out.suffix in SUFFIXES and not out.is_dir():
        return out.suffix
    if out.suffix and not out.is_dir() and not text.endswith(("/", os.sep)):
        raise InputError(
            f"--out must end in {', '.join(SUFFIXES)} or name a folder, not {text!r:.80}"
        )
    return ""


class Output:
    """Writes the shards of a job and assembles its result. Use it as a context manager.

    Args:
        out: the file or folder as the user wrote it.

    Raises:
        InputError: the place cannot be written, or has a suffix of no known kind.
        BackendError: the kind needs pyarrow, which is not installed.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        text = os.fspath(out)
        self.path = Path(text)
        self._kind = output_kind(self.path, text)
        self.folder = self.path
        if self._kind:
            self.folder = self.path.with_name(f"{self.path.name}.parts")
        parquet = self._kind in ("", ".parquet")
        if parquet:
            pyarrow()
        self._format: ShardFormat = ParquetShards() if parquet else NumpyShards()
        if (self.path.is_file() and not self._kind) or not self.path.parent.is_dir():
            raise InputError(
                f"cannot write {text!r:.80}: its parent folder is missing, or it is a file"
            )
        self._lock = _Lock()
        self._range = range(0)
        self._owned = False  # whether no other process may write here
        self._made = False  # whether the folder is new

    @property
    def errors_path(self) -> Path:
        """File of the items without a row."""
        if self._kind:
            return self.path.with_name(f"{self.path.name}.errors.jsonl")
        return self.path / "errors.jsonl"

    @property
    def is_complete(self) -> bool:
        """Whether a single file was assembled."""
        return bool(self._kind) and self.path.exists()

    def recorded(self) -> dict[str, Any] | None:
        """The job that began or completed this output; None if there is none.

        Raises:
            InputError: something else is in its place.
        """
        if self.is_complete:
            with suppress(InputError):  # not a result, or one without its other files
                found = open_result(self.path).origin.get("job")
                if isinstance(found, dict):
                    return found
            raise InputError(
                f"{str(self.path)!r:.200} exists, and is not a whole result of such a job: "
                "give another --out"
            )
        try:
            value = json.loads((self.folder / JOB_FILE).read_bytes())
        except FileNotFoundError:
            if not self.folder.is_dir() or not any(
                path.name[0] != "." for path in self.folder.iterdir()
            ):
                return None
            if (self.folder / JOB_FILE).exists():  # another part has just begun
                return self.recorded()
            raise InputError(
                f"{str(self.folder)!r:.200} is not empty, and not a result of embed"
            ) from None
        except (ValueError, RecursionError, OSError):
            value = None
        if not isinstance(value, dict):
            raise InputError(f"{str(self.folder / JOB_FILE)!r:.200} is damaged")
        return value

    def begin(self, job: Job, *, resume: bool, part: tuple[int, int] | None) -> None:
        """Takes the place for a job.

        Args:
            job: the job.
            resume: whether to complete what exists.
            part: part i of n of the shards, from 1; None for all.

        Raises:
            InputError: another job is there, or another process writes it, or something exists and
                `resume` is false.
        """
        self._job, self._range = job, range(job.shards) if part is None else job.part(part)
        found = self.recorded()
        if self.is_complete:
            self._check(found, resume=resume)
            return
        self._made = not self.folder.exists()
        self.folder.mkdir(exist_ok=True)
        alone = self._lock.take(self.folder, shared=part is not None)
        if alone:
            for left in self.folder.glob(f".*{TEMPORARY}"):
                left.unlink(missing_ok=True)
            for path in (self.errors_path, *result_paths(self.path)) if self._kind else ():
                remove_leftovers(path)
        self._owned = part is None
        if self._owned and not self._present():
            found = None  # the job ended before its first shard
        self._check(found, resume=resume or part is not None)
        if found is None:
            record = {"version": _VERSION, **asdict(job)}
            text = json.dumps(record, indent=2) + "\n"
            write_bytes(self.folder / JOB_FILE, text.encode("ascii"))
        if not resume and part is not None:
            taken = [n for n in self._range if self._shard(n).exists()]
            if taken:
                raise InputError(
                    f"part {part[0]}/{part[1]} of {str(self.path)!r:.200} exists: "
                    "--resume completes it"
                )

    def missing(self) -> list[int]:
        """Numbers of the shards of this part that do not exist, or are damaged."""
        if self.is_complete:
            return []
        return [number for number in self._range if self._head(number) is None]

    def write(self, number: int, shard: Shard) -> None:
        """Writes a shard completely or not at all."""
        self._format.write(self._shard(number), shard, self._job.origin)

    def finish(self) -> Totals:
        """Writes `errors.jsonl`, and assembles a single file if no shard is missing.

        Returns:
            Counts of this part.
        """
        if self.is_complete:
            self._remove_shards()
            counts = open_result(self.path).origin["totals"]
            return Totals(**{f.name: int(counts[f.name]) for f in fields(Totals)})
        found = self._write_errors()
        totals = _sum(count for number, count in found.items() if number in self._range)
        if self._kind and len(found) == self._job.shards:
            record = {"version": _VERSION, **asdict(self._job)}
            origin = {**self._job.origin, "job": record, "totals": asdict(totals)}
            write_result(self.path, self._read_shards(), totals.rows, origin)
            self._remove_shards()
        return totals

    def close(self) -> None:
        """Lets other processes write here; removes what a job without any shard has begun."""
        if self._owned and not self.is_complete and not self._present():
            with suppress(OSError):
                (self.folder / JOB_FILE).unlink(missing_ok=True)
                if self._made:
                    self.folder.rmdir()
        self._owned = False
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shard(self, number: int) -> Path:
        return self.folder / f"part-{number:05}{self._format.suffix}"

    def _head(self, number: int) -> ShardHead | None:
        path = self._shard(number)
        if not path.exists():
            return None
        try:
            head = self._format.head(path)
        except InputError:  # a damaged disk: the shard is made again
            return None
        if {k: head.origin.get(k) for k in self._job.origin} != self._job.origin or (
            (head.start, head.stop) != self._job.items_of(number)
        ):
            raise InputError(f"{str(path)!r:.200} belongs to another job: remove it")
        return head

    def _check(self, found: dict[str, Any] | None, *, resume: bool) -> None:
        """InputError if the output is another job's, or is not to be resumed."""
        if found is None:
            return
        if not resume:
            raise InputError(
                f"{str(self.path)!r:.200} exists: --resume completes it, or give another --out"
            )
        own = {"version": _VERSION, **asdict(self._job)}
        other = [name for name in own if found.get(name) != own[name]]
        if other:
            name = other[0]
            more = f" (and {', '.join(other[1:])})" if other[1:] else ""
            raise InputError(
                f"{str(self.path)!r:.200} belongs to another job: its {name}{more} is "
                f"{found.get(name)!r:.80}, not {own[name]!r:.80}; give another --out"
            )

    def _write_errors(self) -> dict[int, Totals]:
        """Writes the errors of all shards, and returns the counts of each shard.

        Other parts may end at the same time. The shards are looked at again after each writing, so
        the last process to write has seen all.
        """
        found: dict[int, Totals] = {}
        seen: set[int] | None = None
        while seen != (present := self._present()):
            seen, found = present, {}
            with replacing(self.errors_path) as file:
                for number in sorted(present):
                    head = self._head(number)
                    if head is not None:
                        file.writelines(error.line().encode("ascii") for error in head.errors)
                        found[number] = Totals(
                            items=head.stop - head.start, rows=head.count, errors=len(head.errors)
                        )
            if not _sum(found.values()).errors:
                self.errors_path.unlink(missing_ok=True)
        return found

    def _present(self) -> set[int]:
        return {number for number in range(self._job.shards) if self._shard(number).exists()}

    def _read_shards(self) -> Iterator[Shard]:
        for number in range(self._job.shards):
            yield self._format.read(self._shard(number))

    def _remove_shards(self) -> None:
        if not self.folder.is_dir():
            return
        for path in self.folder.glob(f"part-*{self._format.suffix}"):
            path.unlink()
        (self.folder / JOB_FILE).unlink(missing_ok=True)
        self.folder.rmdir()


def _sum(counts: Iterable[Totals]) -> Totals:
    items = rows = errors = 0
    for count in counts:
        items, rows, errors = items + count.items, rows + count.rows, errors + count.errors
    return Totals(items=items, rows=rows, errors=errors)


class _Lock:
    """A lock on a folder, which ends with the process; some systems have none."""

    def __init__(self) -> None:
        self._fd: int | None = None

    def take(self, folder: Path, *, shared: bool) -> bool:
        """Takes the lock, for parts together or for one process; InputError if it is taken.

        Returns:
            Whether no other process has it.
        """
        try:
            import fcntl
        except ImportError:  # not POSIX
            return not shared
        self._fd = os.open(folder, os.O_RDONLY)
        try:
            alone = _try_lock(self._fd, fcntl.LOCK_EX)
            if not shared and alone:
                return True
            # Another part has it alone for the moment of its start.
            for _ in range(_LOCK_TRIES if shared else 0):
                if _try_lock(self._fd, fcntl.LOCK_SH):
                    return alone
                time.sleep(_LOCK_WAIT_S)
        except OSError:  # a network file system without locks of folders
            return not shared
        raise InputError(f"another process writes {str(folder)!r:.200}")

    def release(self) -> None:
        """Releases the lock."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _try_lock(fd: int, kind: int) -> bool:
    import fcntl

    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
