"""Writes, lists, verifies, publishes and removes the files of a checkpoint.

Knows nothing of models and optimizers.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from perception_rt.errors import CheckpointError, InputError
from training.atomic_files import RECIPE_FILE, write_text
from training.recipe.schema import load_config

FOLDER = "checkpoints"  # within run.out_dir
LAST = "LAST"  # file beside the checkpoints that names the newest
MANIFEST = "checkpoint.json"

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of a checkpoint: name, size in bytes, and SHA-256 as hexadecimal digits."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Contents of a checkpoint: finished steps, number of ranks that wrote it, other files."""

    step: int
    ranks: int
    files: tuple[FileEntry, ...]


class ShardWriter(HuggingFaceStorageWriter):
    """Writes this rank's shards as one safetensors file; the main rank then publishes all.

    An error on any rank fails the save on every rank.

    Args:
        folder: temporary folder of this save; the main rank empties it first.
        finish: called on the main rank with the files of all ranks.
    """

    def __init__(self, folder: Path, finish: Callable[[Sequence[FileEntry]], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder = folder
        self._finish = finish

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Prepares the folder, before any rank writes."""
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            shutil.rmtree(self._folder, ignore_errors=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        """Writes this rank's shards and hashes them."""
        written = super().write_data(plan, planner).value()
        names = sorted({result.storage_data.relative_path for result in written})
        entries: Future[list[Any]] = Future()
        entries.set_result([entry_of(self._folder / name) for name in names])
        return entries

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Publishes the checkpoint on the main rank, after all ranks have written."""
        self._finish([entry for entries in results for entry in entries])


def step_name(step: int) -> str:
    """Returns the name of a checkpoint's folder."""
    return f"step_{step:010d}"


def temporary_of(folder: Path, step: int) -> Path:
    """Returns the folder that a checkpoint is written to before it is published."""
    return folder / f".{step_name(step)}.tmp"


def names_of(folder: Path) -> list[str]:
    """Lists the checkpoints in a folder by name, newest first."""
    return sorted((path.name for path in folder.glob("step_*") if path.is_dir()), reverse=True)


def entry_of(path: Path) -> FileEntry:
    """Measures and hashes a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(name=path.name, size=path.stat().st_size, sha256=digest)


def complete(
    folder: Path, step: int, files: Sequence[FileEntry], recipe: str, *, ranks: int
) -> None:
    """Publishes the files of all ranks as a checkpoint and points `LAST` to it."""
    temporary, target = temporary_of(folder, step), folder / step_name(step)
    write_text(temporary / RECIPE_FILE, recipe)
    own = entry_of(temporary / RECIPE_FILE)
    manifest = Manifest(step=step, ranks=ranks, files=(*files, own))
    text = json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1)
    write_text(temporary / MANIFEST, text + "\n")
    sync_folder(temporary)
    if target.exists():
        discard(target)
    temporary.rename(target)
    sync_folder(folder)
    write_text(folder / LAST, f"{target.name}\n")
    sync_folder(folder)


def discard(path: Path) -> None:
    """Removes a checkpoint; it is renamed first, so a partly removed one never looks intact."""
    going = path.with_name(f".{path.name}.old")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def rename_damaged(path: Path) -> None:
    """Keeps a damaged checkpoint under a name that is never loaded."""
    aside = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def find_checkpoint(path: Path) -> Path:
    """Finds a checkpoint: `path` itself, or the one that `LAST` names in or below `path`.

    Raises:
        InputError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for folder in (path, path / FOLDER):
        if (folder / LAST).is_file():
            name = (folder / LAST).read_text("utf-8", errors="replace").strip()
            if name in names_of(folder):
                return folder / name
            raise InputError(f"{folder / LAST} names {name!r:.40}, which does not exist")
    raise InputError(f"{path} is neither a checkpoint nor a run that has one")


def read_manifest(folder: Path) -> Manifest:
    """Reads a checkpoint's list of files.

    Raises:
        CheckpointError: the list is missing or damaged.
    """
    try:
        tree = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = tuple(FileEntry(**entry) for entry in tree["files"])
        if any(Path(entry.name).name != entry.name for entry in files):
            raise CheckpointError(f"{MANIFEST} has a file outside its folder")
        if tree["format"] != _FORMAT:
            raise CheckpointError(f"{MANIFEST} has format {tree['format']!r:.20}, not {_FORMAT}")
        return Manifest(step=int(tree["step"]), ranks=int(tree["ranks"]), files=files)
    except OSError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Checks that a checkpoint's files are unchanged: all sizes, then hashes.

    Args:
        folder: folder of the checkpoint.
        part: index of the share of hashes to check, so that ranks can divide the work.
        parts: number of shares.

    Raises:
        CheckpointError: a file is missing or changed; the message leaves out the checkpoint's name.
    """
    manifest = read_manifest(folder)
    if step_name(manifest.step) != folder.name:
        raise CheckpointError(f"{MANIFEST} names step {manifest.step}")
    known = {entry.name for entry in manifest.files}
    for path in folder.glob("*.safetensors"):
        if path.name not in known:
            raise CheckpointError(f"{path.name} is not in {MANIFEST}")
    for entry in manifest.files:
        path = folder / entry.name
        if not path.is_file():
            raise CheckpointError(f"{entry.name} is missing")
        if (size := path.stat().st_size) != entry.size:
            raise CheckpointError(f"{entry.name} has {size} bytes, not {entry.size}")
    for entry in manifest.files[part::parts]:
        try:
            found = entry_of(folder / entry.name)
        except OSError as error:
            raise CheckpointError(f"{entry.name}: {error.strerror}") from None
        if found != entry:
            raise CheckpointError(f"{entry.name} has another SHA-256 than in {MANIFEST}")


def saved_tensors(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    """Returns whole shapes and dtypes of a checkpoint's tensors by name."""
    entries = reader.read_metadata().state_dict_metadata
    return {k: entry for k, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_recipe_of(folder: Path) -> Any:
    """Reads the resolved recipe of the run that saved a checkpoint.

    Raises:
        CheckpointError: this version cannot read the recipe.
    """
    try:
        return load_config(folder / RECIPE_FILE)
    except InputError as error:
        raise CheckpointError(f"checkpoint {folder.name}: {error}") from None


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
