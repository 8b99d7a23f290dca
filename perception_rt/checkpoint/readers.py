"""Reads untrusted weight files tensor by tensor: safetensors, sharded or not, and torch's `.pt`.

A reader lists all tensors from the headers and reads each on demand from a memory mapping. It runs
no code from a file: `.pt` goes through torch's weights-only loading, and only plain dense tensors
are accepted. Mappings are renewed regularly, so that reading a whole model does not keep it in
memory. The files must not change while a reader is in use.
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

# Bytes read before files are mapped anew: pages of a mapping count as this process's memory.
MAPPED_BYTES = 512 * 1024 * 1024
_WRAPPERS = ("state_dict", "weights", "model")
_MAX_WRAPPERS = 2  # nested
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAFETENSORS_FLOATS = ("F32", "F16", "BF16", "F64")
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Shape and usability of a stored tensor, known before it is read.

    Attributes:
        shape: shape of the tensor.
        unusable: short reason why it cannot be a weight; None for a dense float tensor.
    """

    shape: tuple[int, ...]
    unusable: str | None = None


class FileSet:
    """Detects changes of files after they were opened, and computes their digest."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._stamps = [_stamp(path) for path in paths]
        self._digest: str | None = None

    @property
    def size_bytes(self) -> int:
        """Total size of the files."""
        return sum(size for size, _, _ in self._stamps)

    def sha256(self) -> str:
        """Returns the digest of one file, or of the output of `sha256sum` for several.

        Only the first call reads the files.

        Raises:
            CheckpointError: a file has changed since it was opened.
        """
        if self._digest is None:
            digests = [_file_sha256(path) for path in self._paths]
            self.check()
            self._digest = digests[0] if len(digests) == 1 else self._combined(digests)
        return self._digest

    def check(self) -> None:
        """Raises CheckpointError if a file has changed since it was opened."""
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
        """Headers of all tensors, by key in the file."""

    def read(self, key: str) -> Tensor:
        """Returns a view of the mapped tensor; CheckpointError if it is unreadable."""


class Reader:
    """A weight file, or the shards of a model.

    Attributes:
        label: base name of the opened path, for messages and provenance.
        format: `safetensors` or `pt`.
        files: the files with the tensors.
        headers: headers of all tensors, by key in the file.
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
                    f"{label}: two shards hold {twice[0]!a:.80}; a tensor must be in one shard"
                )
            self.headers |= headers
            self._paths |= dict.fromkeys(headers, path)

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Returns a tensor or some of its rows, on the CPU and in its stored dtype.

        The result is a view of the mapped file, and keeps the mapping alive.

        Raises:
            CheckpointError: the tensor is unreadable, or a file has changed since it was opened.
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
        CheckpointError: there is no readable weight file.
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
        """Returns a view of the mapped tensor."""
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
    """A file of `torch.save` with a dictionary of tensors, possibly in a common wrapper."""

    def __init__(self, path: Path) -> None:
        self._tensors = _tensors(_load_weights_only(path), path.name)
        self.headers = {key: _torch_header(tensor) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        """Returns a view of the mapped tensor."""
        return self._tensors[key].detach()


def _load_weights_only(path: Path) -> object:
    """Loads with torch's weights-only unpickler; any failure becomes one CheckpointError."""
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    # Arbitrary bytes can make the unpickler raise any exception class.
    except Exception as error:
        raise CheckpointError(
            f"{path.name} is damaged or holds more than tensors: torch's weights-only loading "
            "refused it"
        ) from error


def _check_archive(path: Path) -> None:
    """Refuses old formats, which cannot be mapped, and compression, which torch never uses."""
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
    if tensor.is_nested:  # has no shape
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
