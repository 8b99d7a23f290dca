"""Makes an exportable folder: `python training/consolidate.py CHECKPOINT OUT`.

CHECKPOINT is a checkpoint's folder, or a run's folder, which stands for its last checkpoint. OUT
can be passed to `perception-export --checkpoint`. Runs in one process, whatever number of ranks
saved the checkpoint; the optimizer's moments are not read.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from perception_rt.errors import InputError, PerceptionError
from training.checkpoint.files import find_checkpoint, read_recipe_of, saved_tensors, verify
from training.distributed import process_group
from training.recipe.schema import InitConfig
from training.tasks.registry import make_task


def consolidate(path: Path, out: Path) -> Path:
    """Writes the weights of a checkpoint, or of a run's last one, into a folder.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: there is no checkpoint, or `out` is in use.
        CheckpointError: the checkpoint is damaged.
    """
    folder = find_checkpoint(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder")
    verify(folder)
    config = read_recipe_of(folder)
    if hasattr(config, "init"):  # the initial checkpoint may be gone by now
        config = dataclasses.replace(config, init=InitConfig())
    task = make_task(config)
    out.mkdir(parents=True, exist_ok=True)
    task.export(_weights(folder), out)
    return folder


def _weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint by parameter name."""
    reader = HuggingFaceStorageReader(str(folder))
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved_tensors(reader).items()
        if name.startswith("model.")
    }
    with process_group("cpu"):
        load(state, storage_reader=reader)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def main(arguments: Sequence[str]) -> int:
    """Consolidates one checkpoint and returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Makes a folder for `perception-export --checkpoint` from a checkpoint."
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint or of a run")
    parser.add_argument("out", type=Path, help="new or empty folder to write")
    options = parser.parse_args(arguments)
    try:
        folder = consolidate(options.checkpoint, options.out)
    except PerceptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"{folder.name} is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
