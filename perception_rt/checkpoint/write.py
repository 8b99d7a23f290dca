"""Our weights out, as a safetensors file that is either whole or not there at all."""

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
    """Writes a safetensors file; a file of that name is replaced in one step, once all is on disk.

    Args:
        state_dict: tensors under our names, on any device; all of a model, or of its vision tower.
        path: the file to write; its directory must exist.
        layout: whose keys to write; `original` or `hf` for a language model.
        head_dim: channels per attention head of the decoder; `hf` needs it.

    Raises:
        CheckpointError: a name has no place in the layout, `hf` has no fitting `head_dim`, or the
            file cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"cannot write {path}: it exists and is not a regular file")
    on_cpu = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    stored = to_layout(on_cpu, layout, head_dim)
    tensors = {key: tensor.contiguous() for key, tensor in stored.items()}
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
    """Returns when a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
