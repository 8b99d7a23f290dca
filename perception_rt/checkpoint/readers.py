"""Untrusted weight files, read tensor by tensor: safetensors, sharded or not, and torch's `.pt`.

A reader lists every tensor from headers and reads one on demand, memory-mapped. It runs no code
from a file: `.pt` goes through torch's weights-only loading, and only plain dense tensors come out.
A file is mapped anew after every so many bytes, so that reading a whole model does not keep all of
it in memory. It knows nothing of names or architectures. The files must not change while a reader
is in use.
"""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perception_rt.checkpoint.locate import TORCH_SUFFIXES, weight_files
from perception_rt.errors import CheckpointError

# Pages of a mapping that were read count as this process's memory until it is unmapped.
MAPPED_BYTES = 512 * 1024 * 1024
_WRAPPERS = ("state_dict", "weights", "model")
_MAX_WRAPPERS = 2  # one inside the other
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAFETENSORS_FLOATS = ("F32", "F16", "BF16", "F64")
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What is known of a stored tensor before it is read.

    Attributes:
        shape: its shape.
        unusable: why it cannot be a weight, in a word or two; None for a dense float tensor.
    """

    shape: tuple[int, ...]
    unusable: str | None = None


class FileSet:
    """Files as they were when they were opened, and their digest."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._stamps = [_stamp(path) for path in paths]
        self._digest: str | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _, _ in self._stamps)

    def sha256(self) -> str:
        """The digest of one file, or of the lines that `sha256sum` prints for several.

        The files are read on the first call only.

        Raises:
            CheckpointError: a file has changed since it was opened.
        """
        if self._digest is None:
            digests = [_file_sha256(path) for path in self._paths]
            self.check()
            self._digest = digests[0] if len(digests) == 1 else self._combined(digests)
        return self._digest

    def check(self) -> None:
        """CheckpointError if a file has changed since it was opened."""
        for path, stamp in zip(self._paths, self._stamps, strict=True):
            if _stamp(path) != stamp:
                raise CheckpointError(f"{path.name} changed while it was being read")

    def _combined(self, digests: list[str]) -> str:
        lines = (f"{d}  {p.name}\n" for d, p in zip(digests, self._paths, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from error
    return digest.hexdigest()


class OpenFile(Protocol):
    """A mapped weight file of one format."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor, by its key in the file."""

    def read(self, key: str) -> Tensor:
        """The tensor of a key, a view of the mapping; CheckpointError if unreadable."""


class Reader:
    """A weight file, or the shards that together hold a model.

    Attributes:
        label: base name of what was opened, for messages and provenance.
        format: `safetensors` or `pt`.
        files: the files that hold the tensors.
        headers: every tensor, by its key in the file.
    """

    def __init__(self, label: str, paths: Sequence[Path]) -> None:
        torch_files = paths[0].suffix in TORCH_SUFFIXES
        self.label = label
        self.format = "pt" if torch_files else "safetensors"
        self.files = FileSet(paths)
        self.headers: dict[str, Header] = {}
        self._kind = TorchFile if torch_files else SafetensorsFile
        self._paths: dict[str, Path] = {}
        self._open: dict[Path, OpenFile] = {}
        self._mapped_bytes = 0
        for path in paths:
            headers = self._mapped(path).headers
            twice = sorted(self.headers.keys() & headers.keys())
            if twice:
                raise CheckpointError(
                    f"{label}: two shards hold {twice[0]!a:.80}; shards hold different tensors, "
                    "each of them whole"
                )
            self.headers |= headers
            self._paths |= dict.fromkeys(headers, path)

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """The tensor of a key, or some rows of it, on the CPU and in its stored dtype.

        It is a view of the mapped file, which lives as long as a tensor from it.

        Raises:
            CheckpointError: it is unreadable, or a file has changed since it was opened.
        """
        if self._mapped_bytes >= MAPPED_BYTES:
            self._open.clear()
            self._mapped_bytes = 0
        tensor = self._mapped(self._paths[key]).read(key)
        tensor = tensor if rows is None else tensor[rows]
        self._mapped_bytes += tensor.nbytes
        return tensor

    def _mapped(self, path: Path) -> OpenFile:
        if path not in self._open:
            self._open[path] = self._kind(path)
            self.files.check()
        return self._open[path]


def open_reader(path: Path) -> Reader:
    """Opens a weight file by its suffix, an index of shards, or a directory with either.

    Raises:
        CheckpointError: nothing readable is there.
    """
    found = weight_files(path)
    if found.paths[0].suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise CheckpointError(
            f"{found.label} is not a weights file: its name must end in .safetensors, .pt, .pth, "
            ".bin or .index.json"
        )
    return Reader(found.label, found.paths)


class SafetensorsFile:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        try:
            self._handle: Any = safe_open(path, framework="pt", device="cpu")
            keys = list(self._handle.keys())
            self.headers = {key: _safetensors_header(self._handle.get_slice(key)) for key in keys}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path.name} is damaged, or not a safetensors file: its header does not match "
                "its contents"
            ) from error

    def read(self, key: str) -> Tensor:
        """The tensor of a key; a view of the mapped file."""
        try:
            tensor: Tensor = self._handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._name}: {key!a:.80} cannot be read") from error
        return tensor


def _safetensors_header(view: Any) -> Header:
    dtype = view.get_dtype()
    unusable = None if dtype in _SAFETENSORS_FLOATS else f"dtype {dtype}"
    return Header(shape=tuple(view.get_shape()), unusable=unusable)


class TorchFile:
    """A file of `torch.save`: a dictionary of tensors, perhaps inside one of the usual wrappers."""

    def __init__(self, path: Path) -> None:
        self._tensors = _tensors(_load_weights_only(path), path.name)
        self.headers = {key: _torch_header(tensor) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        """The tensor of a key; a view of the mapped file."""
        return self._tensors[key].detach()


def _load_weights_only(path: Path) -> object:
    """The restricted loading of torch, with whatever a hostile file makes it raise in one line."""
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    # The unpickler meets arbitrary bytes, and has no one class for what can go wrong with them.
    except Exception as error:
        raise CheckpointError(
            f"{path.name} is damaged or holds more than tensors: torch's weights-only loading "
            "refused it"
        ) from error


def _check_archive(path: Path) -> None:
    """Refuses old formats, which cannot be mapped, and compression, which torch never writes."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path.name} is truncated, or not written by torch.save since 1.6: weights-only "
            "loading refused it"
        )
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError(
                f"{path.name} has compressed records, which torch.save does not write: "
                "weights-only loading refused it"
            )


def _tensors(content: object, label: str) -> dict[str, Tensor]:
    for _ in range(_MAX_WRAPPERS):
        if isinstance(content, dict):
            inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]
            content = inner[0] if inner else content
    if not isinstance(content, dict):
        raise CheckpointError(f"{label} must hold a dictionary of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{label} must hold a dictionary of tensors; {key!a:.80} is not a tensor"
            )
    return content


def _torch_header(tensor: Tensor) -> Header:
    if tensor.is_nested:  # it has no shape to ask for
        return Header(shape=(), unusable="nested")
    unusable = None
    if tensor.is_quantized:
        unusable = "quantised"
    elif tensor.layout != torch.strided:
        unusable = "not dense"
    elif tensor.device.type != "cpu":
        unusable = "without data"
    elif tensor.dtype not in _FLOATS:
        unusable = f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    return Header(shape=tuple(tensor.shape), unusable=unusable)
