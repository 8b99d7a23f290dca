"""Writes packages: `Stage` collects files beside the destination and publishes them by one rename.

At every moment the destination is absent, the old package or the new one. The next stage removes
what a crash left behind. `perception_rt.package.reader` opens published packages.
"""

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Self

from perception_rt.errors import ExportError, InputError, PackageError
from perception_rt.package.filesystem import FileSystem
from perception_rt.package.manifest import MANIFEST_FILE, FileEntry, Manifest, check_path
from perception_rt.package.onnx_scan import check_graph
from perception_rt.package.reader import read_manifest
from perception_rt.targets import ONNX

_BLOCK = 1024 * 1024
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # errors of a rename onto a used path
_LOCK_ATTEMPTS = 16


class StageWriter:
    """Writes and hashes one staged file; made by `Stage.open_write`."""

    def __init__(self, fs: FileSystem, fd: int, path: str) -> None:
        self._fs = fs
        self._fd: int | None = fd
        self._path = path
        self._hash = hashlib.sha256()
        self._size_bytes = 0

    @property
    def entry(self) -> FileEntry:
        """Digest and size of the bytes written so far."""
        return FileEntry(sha256=self._hash.hexdigest(), size_bytes=self._size_bytes)

    def write(self, buffer: bytes | bytearray | memoryview) -> None:
        """Appends a contiguous buffer, in blocks of 1 MiB.

        Raises:
            ExportError: the write failed; names the file and the number of bytes written.
            InputError: the buffer is not contiguous.
        """
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise InputError(f"{self._path}: only contiguous buffers can be written")
        if not view.nbytes:  # an empty view cannot be cast
            return
        view = view.cast("B")
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._hash.update(block)
            with self._reporting() as fd:
                while block:
                    written = self._fs.write(fd, block)
                    self._size_bytes += written
                    block = block[written:]

    def finish(self) -> None:
        """Makes the file read-only and durable, and closes it."""
        with self._reporting() as fd:
            self._fs.chmod(fd, 0o444)
            self._fs.fsync(fd)
            self._fd = None  # closed even if closing reports an error
            self._fs.close(fd)

    def abort(self) -> None:
        """Closes the file if it is open."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                self._fs.close(fd)

    @contextmanager
    def _reporting(self) -> Iterator[int]:
        """Yields the descriptor and turns system errors into ExportError."""
        if self._fd is None:
            raise ExportError(f"{self._path} is closed")
        try:
            yield self._fd
        except OSError as error:
            raise ExportError(
                f"cannot write {self._path}: {_reason(error)}, after {self._size_bytes} bytes"
            ) from error


class Stage:
    """A package that is being written, in a hidden directory beside its destination.

    Use it as a context manager: if nothing was published when the block ends, the directory is
    removed. A lock on a file beside it shows other processes that the stage is in use.
    """

    def __init__(
        self, dest: Path, directory: Path, *, lock: int, force: bool, fs: FileSystem
    ) -> None:
        self._dest = dest
        self._directory = directory
        self._lock: int | None = lock
        self._force = force
        self._fs = fs
        self._entries: dict[str, FileEntry] = {}
        self._folders: list[Path] = []
        self._manifest: Manifest | None = None

    @classmethod
    def create(
        cls, dest: str | os.PathLike[str], *, force: bool = False, fs: FileSystem | None = None
    ) -> "Stage":
        """Starts a package for the destination `dest`; removes remains of crashed stages first.

        Args:
            dest: package directory to publish; its parent must exist.
            force: whether to replace an existing package.
            fs: object that makes all changes to the disk; None for the real file system.

        Raises:
            InputError: `dest` has no name.
            ExportError: the destination is in use, or its parent cannot be written.
        """
        fs = FileSystem() if fs is None else fs
        path = Path(dest)
        if path.name in ("", "..") or "\0" in path.name:
            raise InputError(f"{os.fspath(dest)!a:.80} does not name a package directory")
        try:
            if not path.parent.is_dir():
                raise ExportError(f"cannot export to {path}: its parent is not a directory")
            _remove_stale(path, fs)
            _check_destination(path, force)
            directory, lock = _new_lock(path, fs)
        except OSError as error:
            raise ExportError(f"cannot write beside {path}: {_reason(error)}") from error
        stage = cls(path, directory, lock=lock, force=force, fs=fs)
        try:
            fs.mkdir(directory)
        except OSError as error:
            stage.discard()
            raise ExportError(f"cannot write beside {path}: {_reason(error)}") from error
        return stage

    @property
    def directory(self) -> Path:
        """Directory of the staged files; `open_package` can open it once it is sealed."""
        return self._directory

    @property
    def entries(self) -> Mapping[str, FileEntry]:
        """Files staged so far, without the manifest."""
        return MappingProxyType(self._entries)

    def path(self, name: str) -> Path:
        """Path of the staged file `name`."""
        if name not in self._entries:
            raise ExportError(f"{name!a:.80} was not staged")
        return self._directory / name

    def write(self, path: str, chunks: Iterable[bytes | bytearray | memoryview]) -> FileEntry:
        """Stages a file with the bytes of `chunks`; raises as `open_write` does."""
        with self.open_write(path) as writer:
            for chunk in chunks:
                writer.write(chunk)
        return self._entries[path]

    @contextmanager
    def open_write(self, path: str) -> Iterator[StageWriter]:
        """Yields a writer of the file `path`; afterwards the file is durable and in `entries`.

        Raises:
            PackageError: `path` is not a valid path of a package file.
            ExportError: `path` was staged before, or the write failed.
        """
        check_path(path)
        if path in self._entries:
            raise ExportError(f"{path} was staged before")
        with self._create(path) as writer:
            yield writer
        self._entries[path] = writer.entry

    def seal(
        self, manifest: Manifest, *, domains: Callable[[str], frozenset[str]] | None = None
    ) -> None:
        """Checks the staged files against `manifest` and writes it; may be repeated.

        Args:
            manifest: manifest that lists the staged files; a later one may have another record.
            domains: returns the operator domains that ONNX graphs of a backend may use, given its
                name; None allows all.

        Raises:
            ExportError: the manifest lists other files than were staged, or the write failed.
            PackageError: a graph is unsafe or does not match the manifest.
        """
        if dict(manifest.content.files) != self._entries:
            raise ExportError("the manifest does not list the files that were staged")
        self._manifest = None
        try:
            for name, spec in manifest.content.graphs.items():
                if spec.kind == ONNX:
                    data = self.path(spec.file).read_bytes()
                    allowed = domains and domains(manifest.content.backend_of(name))
                    check_graph(data, spec, self._entries, domains=allowed)
            self._fs.unlink(self._directory / MANIFEST_FILE)
        except OSError as error:
            raise ExportError(f"cannot seal {self._dest}: {_reason(error)}") from error
        with self._create(MANIFEST_FILE) as writer:
            writer.write(manifest.to_bytes())
        self._manifest = manifest

    def publish(self) -> Path:
        """Moves the sealed package to its destination and returns that path.

        Raises:
            ExportError: the destination was taken meanwhile (the message says whether by the same
                package), or the disk failed. Nothing is published unless the message says so.
        """
        if self._manifest is None or self._lock is None:
            raise ExportError("only a sealed stage can be published, and only once")
        try:
            for folder in [*self._folders, self._directory]:
                self._fs.fsync_directory(folder)
            try:
                self._fs.rename(self._directory, self._dest)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                self._replace(self._manifest)
        except OSError as error:
            raise ExportError(f"cannot publish {self._dest}: {_reason(error)}") from error
        try:
            self._fs.fsync_directory(self._dest.parent)
        except OSError as error:
            raise ExportError(
                f"{self._dest} is published, but a power failure may undo it: {_reason(error)}"
            ) from error
        finally:
            self.discard()  # releases the lock and removes the replaced package
        return self._dest

    def discard(self) -> None:
        """Removes the staged files; does nothing after `publish` or a second time."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        # Best effort: the next stage of this destination removes what cannot be removed now.
        with suppress(OSError):
            _remove_remains(self._dest, self._directory, self._fs)
        with suppress(OSError):
            self._fs.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @contextmanager
    def _create(self, path: str) -> Iterator[StageWriter]:
        """Yields a writer of a new file; finishes the file, or removes it if the block fails."""
        if self._lock is None:
            raise ExportError("the stage was published or discarded")
        target = self._directory / path
        try:
            for parent in reversed(PurePosixPath(path).parents[:-1]):
                folder = self._directory / parent
                if folder not in self._folders:
                    self._fs.mkdir(folder)
                    self._folders.insert(0, folder)  # inner folders are flushed first
            writer = StageWriter(self._fs, self._fs.create(target), path)
        except OSError as error:
            raise ExportError(f"cannot write {path}: {_reason(error)}") from error
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.abort()
            with suppress(OSError):
                self._fs.unlink(target)
            raise

    def _replace(self, manifest: Manifest) -> None:
        """Swaps the stage with the package at the destination."""
        if not self._force:
            raise ExportError(_collision(self._dest, manifest))
        _check_destination(self._dest, force=True)
        if self._fs.exchange(self._directory, self._dest):
            return
        # Without an exchange the destination is absent for a moment. After a crash in that moment,
        # `_remove_remains` moves the old package back.
        aside = _aside(self._directory)
        self._fs.rename(self._dest, aside)
        try:
            self._fs.rename(self._directory, self._dest)
        except OSError:
            self._fs.rename(aside, self._dest)
            raise


def _check_destination(dest: Path, force: bool) -> None:
    """ExportError unless `dest` is absent, empty or a package that may be replaced."""
    if not os.path.lexists(dest):
        return
    if dest.is_symlink() or not dest.is_dir():
        raise ExportError(f"{dest} exists and is not a directory; it is not replaced")
    if not any(dest.iterdir()):
        return  # a rename replaces an empty directory
    try:
        found = read_manifest(dest)
    except PackageError as error:
        raise ExportError(f"an export replaces only an engine package: {error}") from error
    if not force:
        raise ExportError(f"{dest} already exists, with the id {found.id}; force replaces it")


def _collision(dest: Path, manifest: Manifest) -> str:
    """Message for a destination that was taken while a package with `manifest` was written."""
    try:
        found = read_manifest(dest)
    except PackageError:
        return f"{dest} already exists and is not an engine package"
    if found.id == manifest.id:
        return f"{dest} already exists, with the same id {found.id}"
    return f"{dest} already exists, with another id {found.id}; this export has {manifest.id}"


def _lock_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


def _aside(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.old")


def _new_lock(dest: Path, fs: FileSystem) -> tuple[Path, int]:
    """Path of a new stage directory and its lock, which is taken before the directory is made."""
    for _ in range(_LOCK_ATTEMPTS):
        directory = dest.with_name(f".{dest.name}.stage-{uuid.uuid4().hex}")
        with suppress(BlockingIOError):
            fd = fs.lock(_lock_file(directory))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), _lock_file(directory).lstat()):
                    return directory, fd
            fs.close(fd)
        # Another process removed the file as remains of a crash before it was locked.
    raise ExportError(f"cannot lock a stage of {dest}: tried {_LOCK_ATTEMPTS} times")


def _remove_stale(dest: Path, fs: FileSystem) -> None:
    """Removes remains of crashed stages of `dest`; keeps live stages and other files."""
    pattern = re.compile(rf"(\.{re.escape(dest.name)}\.stage-[0-9a-f]{{32}})(?:\.lock|\.old)?")
    matches = [pattern.fullmatch(entry.name) for entry in dest.parent.iterdir()]
    for stem in sorted({match.group(1) for match in matches if match}):
        directory = dest.with_name(stem)
        with suppress(OSError):  # a live stage or another user's: neither is in the way
            lock = fs.lock(_lock_file(directory))
            try:
                _remove_remains(dest, directory, fs)
            finally:
                fs.close(lock)


def _remove_remains(dest: Path, directory: Path, fs: FileSystem) -> None:
    """Removes a stage whose lock is held; moves back the package that was set aside for it."""
    aside = _aside(directory)
    if os.path.lexists(dest):
        fs.remove_tree(aside)
    elif os.path.lexists(aside):
        fs.rename(aside, dest)
    fs.remove_tree(directory)
    fs.unlink(_lock_file(directory))


def _reason(error: OSError) -> str:
    """The system's message without the path that it adds."""
    return error.strerror or type(error).__name__
