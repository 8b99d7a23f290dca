"""Recognises the text that Git LFS leaves in place of a file."""

from pathlib import Path

from perception_rt.errors import CheckpointError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """CheckpointError for a pointer of Git LFS; OSError if the file cannot be opened."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path.name} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its "
                "folder"
            )
