"""Reads untrusted weight files tensor by tensor: safetensors, sharded or not, and torch's files.

A reader lists all tensors from the headers and reads each on demand from a memory mapping. It runs
no code from a file: `.pt` goes through torch's weights-only loading, and only plain dense tensors
are accepted. Mappings are renewed regularly, so that reading a whole model does not keep it in
memory. The files must not change while a reader is in use.
"""

import hashlib
import re
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perception_rt.checkpoint.locate import SUFFIXES, is_torch_file, weight_files
from perception_rt.checkpoint.wrappers import find_tensors
from perception_rt.errors import CheckpointError

# Bytes read before files are mapped anew: pages of a mapping count as this process's memory.
MAPPED_BYTES = 512 * 1024 * 1024
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAFETENSORS_FLOATS = ("F32", "F16", "BF16", "F64")
_HASH_BLOCK = 1 << 20
_PICKLE_START = b"\x80"
# Keeps tensors and dictionaries of them, and turns modules into such; has no quotes, for any shell.
_CONVERSION = (
    "import sys, torch; f = lambda v: v if torch.is_tensor(v) else f(v.state_dict()) if "
    "isinstance(v, torch.nn.Module) else {k: f(w) for k, w in v.items() if isinstance(k, str) and "
    "isinstance(w, (dict, torch.Tensor, torch.nn.Module))}; torch.save(f(torch.load(sys.argv[1], "
    "map_location=lambda s, _: s, weights_only=False)), sys.argv[2])"
)
# A class or function that weights-only loading does not know; others it blocks as dangerous.
_REFUSED = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")


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
    """A mapped weight file of one format.

    Attributes:
        averaged: whether the tensors are an averaged copy (EMA) that was asked for or is alone.
        left_out: names of averaged copies in the file that were not taken.
    """

    averaged: bool
    left_out: tuple[str, ...]

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
        averaged: whether the tensors are an averaged copy (EMA) that was asked for or is alone.
        left_out: names of averaged copies in the files that were not taken.
    """

    def __init__(self, label: str, paths: Sequence[Path], *, ema: bool = False) -> None:
        torch_files = is_torch_file(paths[0])
        self.label = label
        self.format = "pt" if torch_files else "safetensors"
        self.files = FileSet(paths)
        self.headers: dict[str, Header] = {}
        self.averaged = False
        self.left_out: tuple[str, ...] = ()
        self._kind = partial(TorchFile, ema=ema) if torch_files else SafetensorsFile
        self._paths: dict[str, Path] = {}
        self._open: dict[Path, OpenFile] = {}
        self._mapped_bytes = 0
        for path in paths:
            opened = self._mapped(path)
            headers = opened.headers
            self.averaged |= opened.averaged
            self.left_out += opened.left_out
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


def open_reader(path: Path, *, ema: bool = False) -> Reader:
    """Opens a weight file by its suffix, an index of shards, or a directory with either.

    Args:
        path: as for `open_checkpoint`.
        ema: take an averaged copy of the weights if a file of torch has one beside them.

    Raises:
        CheckpointError: there is no readable weight file.
    """
    found = weight_files(path)
    if not found.paths[0].name.endswith(SUFFIXES):
        raise CheckpointError(
            f"{found.label} is not a weights file: its name must end in "
            f"{', '.join(SUFFIXES)} or .index.json"
        )
    return Reader(found.label, found.paths, ema=ema)


class SafetensorsFile:
    """A safetensors file."""

    averaged = False
    left_out: tuple[str, ...] = ()

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
    """A file of `torch.save` with a dictionary of tensors, possibly within others.

    Args:
        path: the file.
        ema: take an averaged copy of the weights if there is one.
    """

    def __init__(self, path: Path, *, ema: bool = False) -> None:
        found = find_tensors(_load_weights_only(path), path.name, ema=ema)
        self._tensors = found.tensors
        self.averaged, self.left_out = found.averaged, found.left_out
        self.headers = {key: _torch_header(tensor) for key, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        """Returns a view of the mapped tensor."""
        return self._tensors[key].detach()


def _load_weights_only(path: Path) -> object:
    """Loads with torch's weights-only unpickler; any failure becomes one CheckpointError."""
    try:
        # Files of torch before 1.6 cannot be mapped, and are read as a whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_check_archive(path))
    except CheckpointError:
        raise
    # Arbitrary bytes can make the unpickler raise any exception class.
    except Exception as error:
        refused = _REFUSED.search(str(error))
        if refused is not None:
            raise CheckpointError(_conversion(path, refused[1])) from error
        raise CheckpointError(
            f"{path.name} is damaged or holds more than tensors: torch's weights-only loading "
            "refused it"
        ) from error


def _conversion(path: Path, refused: str) -> str:
    """Names the refused class or function, and the command that leaves it out."""
    target = path.with_name(f"{path.name.partition('.')[0]}-tensors.pt")
    files = f"{shlex.quote(str(path))} {shlex.quote(str(target))}"
    return (
        f"{path.name} holds {refused:.80} besides tensors: weights-only loading refused it, as it "
        "can run code. If you trust the file, keep its tensors alone and export those: "
        f'python -c "{_CONVERSION}" {files}'
    )


def _check_archive(path: Path) -> bool:
    """Whether a file is a zip archive, as torch writes it since 1.6.

    Raises:
        CheckpointError: the file is nothing that `torch.save` writes.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(1) == _PICKLE_START:
                return False
        raise CheckpointError(
            f"{path.name} is truncated, or not written by torch.save: weights-only loading refused "
            "it"
        )
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(
            f"{path.name} is a TorchScript program, not weights: save the module's state_dict()"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path.name} has compressed records, which torch.save does not write: "
            "weights-only loading refused it"
        )
    return True


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
