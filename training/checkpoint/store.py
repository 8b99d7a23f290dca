"""Saves and restores the state of a run: sharded, asynchronous, atomic.

A checkpoint is a folder with at most one safetensors file per rank, the resolved recipe, and a list
of sizes and SHA-256 hashes. It gets its final name once everything is on disk; `LAST` names the
newest one. torch.distributed.checkpoint reshards tensors, so a run can resume with another number
of ranks. Checkpoints contain no code. This module knows nothing of tasks.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from perception_rt.errors import CheckpointError, InputError
from training.atomic_files import RECIPE_FILE
from training.checkpoint.files import (
    FOLDER,
    LAST,
    FileEntry,
    ShardWriter,
    complete,
    discard,
    entry_of,
    names_of,
    read_manifest,
    read_recipe_of,
    rename_damaged,
    saved_tensors,
    step_name,
    temporary_of,
    verify,
)
from training.data.loader import LaneStream
from training.distributed import Group
from training.recipe.schema import TrainConfig
from training.recipe.tree import leaves
from training.tasks.task import Learner

# Prefixes of settings that change nothing but rounding.
_FREE = ("run.", "parallel.", "optim.accumulation", "optim.stop_above")
_STEPS = "schedule.steps"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHOWN = 3  # most names in a message


class Checkpoints:
    """The checkpoints of a run. Every rank makes one.

    At most one save is in progress; a thread writes it from a copy of the state.

    Args:
        out_dir: the recipe's `run.out_dir`.
        config: the recipe.
        group: this process's place among the ranks.
    """

    def __init__(self, out_dir: Path, config: TrainConfig, group: Group) -> None:
        self._folder = out_dir / FOLDER
        self._config = config
        self._main = group.is_main
        # A group of its own: a save's messages overlap those of training.
        self._channel = dist.new_group(backend="gloo")
        self._step = -1  # newest checkpoint, finished or in progress
        self._running: Future[Any] | None = None
        self._bytes = 0  # tensor bytes of that checkpoint

    def save(
        self,
        step: int,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        stream: LaneStream[Any, Any],
    ) -> None:
        """Starts to save the state after `step` steps. All ranks must call it.

        Raises:
            CheckpointError: the previous save failed.
        """
        if step == self._step:
            return
        self.wait()
        state = _state(learner, optimizer, stream)
        writer = ShardWriter(temporary_of(self._folder, step), self._finish(step))
        saved = async_save(state, storage_writer=writer, process_group=self._channel)
        assert isinstance(saved, Future)
        self._step, self._running = step, saved
        self._bytes = sum(t.numel() * t.element_size() for _, t in leaves(state))

    @property
    def failed(self) -> bool:
        """Whether the latest save has failed; `wait` then raises the reason."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def wait(self) -> None:
        """Waits for a save in progress. All ranks must call it.

        Raises:
            CheckpointError: the save failed; earlier checkpoints are still there.
        """
        error = self._end()
        if error is not None:
            raise CheckpointError(self._reason(error)) from None

    def close(self) -> None:
        """Waits for a save in progress and ignores its error, for a run that failed otherwise."""
        self._end()

    def resume(
        self, learner: Learner, optimizer: torch.optim.Optimizer, stream: LaneStream[Any, Any]
    ) -> int:
        """Restores the newest intact checkpoint if `run.resume` is set.

        Returns:
            The number of finished steps; 0 for a new run.

        Raises:
            InputError: there is a checkpoint, but `run.resume` is not set.
            CheckpointError: no checkpoint is intact, or the saved run computes something else.
        """
        names = self._names()
        if not self._config.run.resume:
            if names:
                raise _used(self._config.run.out_dir)
            return 0
        if not names and (self._folder / LAST).exists():
            raise CheckpointError(
                f"run.out_dir {self._config.run.out_dir} had checkpoints and has none; "
                "start again in another folder"
            )
        if not names:
            self._tell(f"no checkpoint in {self._config.run.out_dir} yet; starting at step 0")
            return 0
        good = self._newest_whole(names)
        self._load(self._folder / good, learner, optimizer, stream)
        if self._main:
            for name in names[: names.index(good)]:
                rename_damaged(self._folder / name)
        return self._step

    def _finish(self, step: int) -> Callable[[Sequence[FileEntry]], None]:
        """Returns the main rank's action after all ranks have written their files."""
        text = self._config.to_yaml()
        keep = self._config.run.keep

        def finish(files: Sequence[FileEntry]) -> None:
            complete(self._folder, step, files, text, ranks=dist.get_world_size(self._channel))
            for name in names_of(self._folder)[keep:] if keep else []:
                if name != step_name(step):
                    discard(self._folder / name)

        return finish

    def _end(self) -> BaseException | None:
        """Waits for a save in progress; returns its error after removing what it left."""
        running, self._running = self._running, None
        error = None if running is None else running.exception()
        if error is not None and self._main:
            shutil.rmtree(temporary_of(self._folder, self._step), ignore_errors=True)
        return error

    def _reason(self, error: BaseException) -> str:
        """Describes a failed save in one line."""
        causes = [error]
        if isinstance(error, CheckpointException):
            causes = [cause for cause, _ in error.failures.values()]
        found = next((cause for cause in causes if isinstance(cause, OSError)), None)
        what = "a rank failed" if found is None else found.strerror or "a file failed"
        if found is not None and found.errno in _NO_SPACE:
            free = shutil.disk_usage(self._folder).free
            what += f", of {self._bytes / 1e6:.1f} MB to write; {free / 1e6:.1f} MB are free"
        names = names_of(self._folder)
        last = f"the last one is {names[0]}" if names else "there is none before it"
        return f"checkpoint {step_name(self._step)} was not saved: {what}; {last}"

    def _names(self) -> list[str]:
        """Names of the checkpoints on the main rank, newest first, after removing leftovers."""
        found: list[Any] = [None]
        if self._main:
            for left in self._folder.glob(".step_*"):
                shutil.rmtree(left, ignore_errors=True)
            found = [names_of(self._folder)]
        dist.broadcast_object_list(found, src=0, group=self._channel)
        names: list[str] = found[0]
        return names

    def _newest_whole(self, names: Sequence[str]) -> str:
        """The first intact checkpoint of `names`; ranks divide the hashing and agree."""
        rank, ranks = dist.get_rank(self._channel), dist.get_world_size(self._channel)
        for name in names:
            own: str | None = None
            try:
                verify(self._folder / name, part=rank, parts=ranks)
            except CheckpointError as error:
                own = str(error)
            everyone: list[str | None] = [None] * ranks
            dist.all_gather_object(everyone, own, group=self._channel)
            problem = next((text for text in everyone if text is not None), None)
            if problem is None:
                return name
            self._tell(f"WARNING: checkpoint {name} is damaged and skipped: {problem}")
        raise CheckpointError(
            f"run.out_dir {self._config.run.out_dir}: none of {len(names)} checkpoints is intact; "
            "start again in another folder"
        )

    def _load(
        self,
        folder: Path,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        stream: LaneStream[Any, Any],
    ) -> None:
        if steps := _same_settings(folder, self._config):
            self._tell(
                f"schedule.steps rises from {steps} to {self._config.schedule.steps}; from now on, "
                "the learning rate follows the new schedule"
            )
        reader = HuggingFaceStorageReader(str(folder))
        saved = {key: entry.size for key, entry in saved_tensors(reader).items()}
        _give_moments(learner, optimizer, saved)
        state = _state(learner, optimizer, stream)
        _require_fit(folder.name, saved, {key: tensor.shape for key, tensor in leaves(state)})
        try:
            load(state, storage_reader=reader, process_group=self._channel)
        except CheckpointException:
            raise CheckpointError(f"checkpoint {folder.name} cannot be read") from None
        stream.load_state(state["data"])
        self._step = read_manifest(folder).step

    def _tell(self, text: str) -> None:
        if self._main:
            print(text, file=sys.stderr, flush=True)


def require_startable(config: TrainConfig) -> None:
    """Finds out without a process group whether a run may start or be resumed.

    Raises:
        InputError: `out_dir` holds a run that is not to be resumed, or is no folder that can be
            made or written to.
        CheckpointError: the run to be resumed computes something else.
    """
    _require_folder(Path(config.run.out_dir))
    folder = Path(config.run.out_dir) / FOLDER
    names = names_of(folder)
    if names and not config.run.resume:
        raise _used(config.run.out_dir)
    if names and _has_whole_recipe(folder / names[0]):
        _same_settings(folder / names[0], config)


def _require_folder(out_dir: Path) -> None:
    """InputError if a folder cannot be made, or not be written to."""
    try:
        nearest = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
        problem = "" if os.access(nearest, os.W_OK | os.X_OK) else "it cannot be written to"
        problem = problem if nearest.is_dir() else "it is not a folder"
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        nearest = out_dir
        problem = getattr(error, "strerror", None) or "not a path"
    if problem:
        raise InputError(
            f"run.out_dir {str(out_dir)!r:.200} cannot be used: {str(nearest)!r:.200}: {problem}; "
            "name another folder"
        )


def _has_whole_recipe(folder: Path) -> bool:
    try:
        return entry_of(folder / RECIPE_FILE) in read_manifest(folder).files
    except (CheckpointError, OSError):
        return False  # a damaged checkpoint is skipped later


def _same_settings(folder: Path, config: TrainConfig) -> int | None:
    """Compares the saved recipe with this one.

    Returns:
        The saved number of steps if this recipe has more, else None.

    Raises:
        CheckpointError: the saved recipe computes something else, apart from more steps.
    """
    saved, wanted = _decisive(read_recipe_of(folder)), _decisive(config)
    steps = int(saved[_STEPS])
    longer = config.schedule.steps > steps
    for key in {**wanted, **saved}:
        if saved.get(key) != wanted.get(key) and not (longer and key == _STEPS):
            raise CheckpointError(
                f"checkpoint {folder.name} was saved with {key} = {saved.get(key)}, "
                f"not {wanted.get(key)}"
            )
    return steps if longer else None


def _used(out_dir: str) -> InputError:
    return InputError(
        f"run.out_dir {out_dir} holds a run; "
        "continue it with --set run.resume=true, or choose another"
    )


def full_weights(learner: Learner, *, keep: bool) -> dict[str, Tensor]:
    """Gathers all weights of a model on the CPU by parameter name. All ranks must call it.

    Args:
        learner: learner, sharded or not.
        keep: whether this rank needs the weights; others return an empty mapping.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in _model_state(learner).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            weights[name] = whole.detach().cpu()
    return weights


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """Settings that decide what a run computes."""
    settings = leaves(config.to_dict())
    return {k: v for k, v in settings if k == "run.seed" or not k.startswith(_FREE)}


def _model_state(learner: Learner) -> dict[str, Tensor]:
    """Parameters, or this rank's shards, by name."""
    # The learner's state, not its model's: sharding hooks into the learner.
    tensors, own = learner.state_dict(), "model."
    return {name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)}


def _state(
    learner: Learner, optimizer: torch.optim.Optimizer, stream: LaneStream[Any, Any]
) -> dict[str, dict[str, Tensor]]:
    """Everything that training changes, as tensors that loading writes into."""
    model = _model_state(learner)
    moments = {
        f"{name}.{key}": moment
        for name, parameter in learner.model.named_parameters()
        for key, moment in optimizer.state.get(parameter, {}).items()
    }
    return {"model": model, "optimizer": moments, "data": stream.state()}


def _give_moments(
    learner: Learner, optimizer: torch.optim.Optimizer, saved: dict[str, torch.Size]
) -> None:
    """Creates zero AdamW moments for every trained parameter that has saved ones."""
    for name, parameter in learner.model.named_parameters():
        if parameter.requires_grad and f"optimizer.{name}.exp_avg" in saved:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _require_fit(name: str, saved: dict[str, torch.Size], wanted: dict[str, torch.Size]) -> None:
    """CheckpointError unless the tensors agree in names and shapes; it names a few that differ."""
    missing = [key for key in wanted if key not in saved]
    unknown = [key for key in saved if key not in wanted]
    other = [
        f"{key} {tuple(saved[key])}, not {tuple(wanted[key])}"
        for key in wanted
        if key in saved and saved[key] != wanted[key]
    ]
    kinds = {"lacks": missing, "has unknown": unknown, "has": other}
    found = [f"{kind} {_some(keys)}" for kind, keys in kinds.items() if keys]
    if found:
        raise CheckpointError(f"checkpoint {name} is of another model: it {'; it '.join(found)}")


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(sorted(keys)[:_SHOWN]) + more
