"""Opens packages and returns only bytes whose hash matches the manifest.

All files are opened once, below a directory descriptor and without following links, and stay open.
Bytes are hashed through the descriptor that they are read from, so replacing or removing a package
does not disturb its readers. ONNX graphs are scanned before they are returned.
"""

import hashlib
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self, TypeVar

from perception_rt.errors import PackageError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package.contract import GraphSpec
from perception_rt.package.demo_cache import locate
from perception_rt.package.manifest import MANIFEST_FILE, FileEntry, Manifest, parse
from perception_rt.package.onnx_scan import check_graph
from perception_rt.targets import ONNX

_T = TypeVar("_T")

_BLOCK = 1024 * 1024
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OPEN_ATTEMPTS = 64  # while the package is being replaced


class Package:
    """An open package, made by `open_package`.

    Several threads may use it, but not while one calls `close`.
    """

    def __init__(self, manifest: Manifest, fds: Mapping[str, int], shown: str) -> None:
        self.manifest = manifest
        self._fds = dict(fds)
        self._shown = shown
        self._maps: dict[str, memoryview] = {}
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.content.name

    def graph(self, name: str) -> GraphSpec:
        """Specification of the graph `name`; PackageError if there is none."""
        graphs = self.manifest.content.graphs
        if name not in graphs:
            raise PackageError(f"{self._shown}: no graph {name!a:.80}, there are {sorted(graphs)}")
        return graphs[name]

    def read(self, file: str) -> bytes:
        """The bytes of a small file, hashed at each call.

        Raises:
            PackageError: the manifest lists no such file, or its hash does not match.
        """
        fd, entry = self._listed(file)
        data = b"".join(_blocks(fd, entry.size_bytes))
        self._compare(file, hashlib.sha256(data).hexdigest())
        return data

    def read_graph(self, name: str, *, domains: frozenset[str] | None = None) -> bytes:
        """The bytes of an ONNX graph.

        Args:
            name: name of the graph.
            domains: operator domains that it may use; None allows all.

        Raises:
            PackageError: there is no such graph, it is not in ONNX, or `check_graph` refuses it.
        """
        spec = self.graph(name)
        if spec.kind != ONNX:
            raise PackageError(
                f"{self._shown}: graph {name!a:.80} is of kind {spec.kind}, not ONNX"
            )
        data = self.read(spec.file)
        check_graph(data, spec, self.manifest.content.files, domains=domains)
        return data

    def map(self, file: str) -> memoryview:
        """The bytes of a file as a read-only mapping, hashed at the first call only.

        Arrays over the mapping may outlive the package.

        Raises:
            PackageError: the manifest lists no such file, or its hash does not match.
        """
        fd, entry = self._listed(file)
        with self._lock:
            if file not in self._verified:
                self._verify(file)
            if file not in self._maps:
                # mmap refuses empty files.
                mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ) if entry.size_bytes else b""
                self._maps[file] = memoryview(mapped)
            return self._maps[file]

    def release(self, file: str) -> None:
        """Releases the resident pages of a mapping; later reads load them from the file again."""
        with self._lock:
            view = self._maps.get(file)
            if view is not None and isinstance(view.obj, mmap.mmap):
                view.obj.madvise(mmap.MADV_DONTNEED)

    def verify(self) -> None:
        """Hashes all files that were not hashed yet, several at a time.

        Raises:
            PackageError: names a file whose hash does not match.
        """
        files = self.manifest.content.files
        with self._lock, ThreadPoolExecutor(os.cpu_count()) as pool:
            pending = sorted(
                set(files) - self._verified, key=lambda file: files[file].size_bytes, reverse=True
            )
            try:
                for _ in pool.map(self._verify, pending):
                    pass  # raises the exception of a failed call
            except RuntimeError:  # the interpreter is ending, and a daemon thread loads a package
                for file in pending:
                    self._verify(file)

    def close(self) -> None:
        """Closes the files; mappings that are in use stay valid."""
        fds, self._fds = self._fds, {}
        self._maps.clear()
        for fd in fds.values():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _listed(self, file: str) -> tuple[int, FileEntry]:
        files = self.manifest.content.files
        if file not in files:
            raise PackageError(f"{self._shown}: no file {file!a:.80} in this package")
        if file not in self._fds:
            raise PackageError(f"{self._shown}: the package is closed")
        return self._fds[file], files[file]

    def _verify(self, file: str) -> None:
        fd, entry = self._listed(file)
        digest = hashlib.sha256()
        for block in _blocks(fd, entry.size_bytes):
            digest.update(block)
        self._compare(file, digest.hexdigest())
        self._verified.add(file)

    def _compare(self, file: str, sha256: str) -> None:
        if sha256 != self.manifest.content.files[file].sha256:
            raise PackageError(f"{self._shown}: {file} is damaged: its SHA-256 is {sha256}")


def open_package(
    path: str | os.PathLike[str], *, expect: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Package:
    """Opens a package and checks everything except file contents, which `Package` checks on use.

    Args:
        path: the package directory, or "demo:pe" or "demo:plm" for a shipped model.
        expect: required package id, `sha256:...`; None accepts any. The manifest in the package
            shows damage; only an id from elsewhere shows a deliberate exchange.
        limits: bounds on the manifest and the number of files.

    Raises:
        PackageError: there is no package, it is incomplete or unsafe, or has another id.
    """
    path, expect = locate(path, expect)
    shown = os.fspath(path)
    return _in_directory(shown, lambda fd: _open_files(fd, shown, expect, limits))


def verify_package(path: str | os.PathLike[str], *, expect: str | None = None) -> Manifest:
    """Opens a package, hashes every file and scans every graph; returns the manifest.

    Raises:
        PackageError: the package is damaged, incomplete or unsafe, or has another id.
    """
    with open_package(path, expect=expect) as package:
        package.verify()
        for name, spec in package.manifest.content.graphs.items():
            if spec.kind == ONNX:
                package.read_graph(name)
        return package.manifest


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a package, without a look at file contents.

    Raises:
        PackageError: there is no package, or the directory holds a file that is not listed.
    """
    shown = os.fspath(locate(path)[0])

    def read(directory: int) -> Manifest:
        with ExitStack() as stack:
            manifest = _load_manifest(directory, shown, DEFAULT_LIMITS)
            _open_folders(directory, manifest, shown, stack)
            return manifest

    return _in_directory(shown, read)


def _in_directory(shown: str, action: Callable[[int], _T]) -> _T:
    """Returns `action(descriptor of the directory)`.

    A package that is replaced meanwhile vanishes while `action` runs. So a failure counts only if
    the path still names the open directory; otherwise `action` runs on the new one.
    """
    for _ in range(_OPEN_ATTEMPTS):
        directory = _open_directory(shown)
        try:
            return action(directory)
        except PackageError:
            if _is_at(directory, shown):
                raise
        finally:
            os.close(directory)
    raise PackageError(f"{shown}: was replaced during each of {_OPEN_ATTEMPTS} attempts to open it")


def _open_directory(shown: str) -> int:
    try:
        return os.open(shown, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise PackageError(f"{shown}: no engine package: it is missing") from None
    except OSError as error:
        raise PackageError(f"{shown}: no engine package: {error.strerror}") from None
    except ValueError:  # a NUL, or a lone surrogate
        raise PackageError(f"{shown!a:.80}: no engine package: not a path") from None


def _open_files(directory: int, shown: str, expect: str | None, limits: Limits) -> Package:
    manifest = _load_manifest(directory, shown, limits)
    if expect is not None and manifest.id != expect:
        raise PackageError(f"{shown}: the package id is {manifest.id}, expected {expect!a:.80}")
    with ExitStack() as stack, ExitStack() as opened:
        folders = _open_folders(directory, manifest, shown, stack)
        fds: dict[str, int] = {}
        for path, entry in manifest.content.files.items():
            fds[path] = _open_file(folders, path, shown)
            opened.callback(os.close, fds[path])
            size_bytes = os.fstat(fds[path]).st_size
            if size_bytes != entry.size_bytes:
                raise PackageError(
                    f"{shown}: {path} has {size_bytes} bytes instead of {entry.size_bytes}"
                )
        opened.pop_all()
        return Package(manifest, fds, shown)


def _load_manifest(directory: int, shown: str, limits: Limits) -> Manifest:
    fd = _open_file({"": directory}, MANIFEST_FILE, shown)
    try:
        data = b"".join(_blocks(fd, limits.manifest_bytes + 1))
    finally:
        os.close(fd)
    try:
        return parse(data, limits)
    except PackageError as error:
        raise PackageError(f"{shown}: {error}") from None


def _open_folders(
    directory: int, manifest: Manifest, shown: str, stack: ExitStack
) -> dict[str, int]:
    """Opens the folders of a package; refuses any entry that the manifest does not imply."""
    files = manifest.content.files
    splits = [path.split("/") for path in files]
    folders = {"": directory}
    for folder in sorted({"/".join(s[:i]) for s in splits for i in range(1, len(s))}):
        parent, _, name = folder.rpartition("/")
        try:
            fd = os.open(name, _READ_FLAGS | os.O_DIRECTORY, dir_fd=folders[parent])
        except OSError as error:
            raise PackageError(f"{shown}: cannot open {folder}: {error.strerror}") from None
        stack.callback(os.close, fd)
        folders[folder] = fd
    for folder, fd in folders.items():
        with os.scandir(fd) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if path not in folders and path not in files and path != MANIFEST_FILE:
                    raise PackageError(f"{shown}: {path!a:.160} does not belong to this package")
    return folders


def _open_file(folders: Mapping[str, int], path: str, shown: str) -> int:
    """Opens a regular file that has one name; follows no link and does not block on a pipe."""
    folder, _, name = path.rpartition("/")
    try:
        # Checked before opening: merely opening some devices has an effect.
        info = os.stat(name, dir_fd=folders[folder], follow_symlinks=False)
        if stat.S_ISREG(info.st_mode):
            fd = os.open(name, _READ_FLAGS, dir_fd=folders[folder])
            info = os.fstat(fd)
            if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
                return fd
            os.close(fd)
    except OSError as error:
        raise PackageError(f"{shown}: cannot open {path}: {error.strerror}") from None
    raise PackageError(f"{shown}: {path} is not a regular file with one name")


def _blocks(fd: int, size_bytes: int) -> Iterator[bytes]:
    """The first `size_bytes` of a file, or fewer if it is shorter."""
    position = 0
    while position < size_bytes:
        block = os.pread(fd, min(_BLOCK, size_bytes - position), position)
        if not block:
            return
        position += len(block)
        yield block


def _is_at(directory: int, shown: str) -> bool:
    """Whether the path still names the open directory."""
    try:
        found = Path(shown).stat()
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(directory))
