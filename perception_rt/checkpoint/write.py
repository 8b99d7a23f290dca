"""Writes our weights to a safetensors file, whole or not at all."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from perception_rt.checkpoint.names import Layout, to_layout
from perception_rt.errors import CheckpointError

_MODE = 0o644


def save_checkpoint(
    state_dict: Mapping[str, Tensor],
    path: Path | str,
    layout: Layout = "reference",
    *,
    head_dim: int | None = None,
) -> None:
    """Writes a safetensors file, and replaces an existing one once all bytes are on disk.

    Args:
        state_dict: tensors under our names, on any device; those of a model or its vision tower.
        path: the file to write; its directory must exist.
        layout: layout of the keys; `original` or `hf` for a language model.
        head_dim: channels per attention head of the decoder; `hf` needs it.

    Raises:
        CheckpointError: a name has no place in the layout, `head_dim` does not fit `hf`, or the
            file cannot be written.
    """
    on_cpu = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    save_tensors(to_layout(on_cpu, layout, head_dim), Path(path))


def save_tensors(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors on the CPU under their keys; see `save_checkpoint`."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"cannot write {path}: it exists and is not a regular file")
    tensors = {key: tensor.contiguous() for key, tensor in state_dict.items()}
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(_MODE)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    except SafetensorError as error:
        reason = (
            "its directory does not exist" if not path.parent.is_dir() else "no space or access"
        )
        raise CheckpointError(f"cannot write {path}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
