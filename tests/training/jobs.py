"""Training runs on forked ranks, for tests of ranks, kills and signals.

A server imports everything once and forks the ranks, so that a rank starts within a moment.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from training.checkpoint import files
from training.checkpoint.files import LAST, step_name
from training.distributed import process_group
from training.recipe.schema import TrainConfig
from training.tasks.registry import make_task
from training.train import main
from training.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
TINY = CONFIGS / "pe_tiny.yaml"
STEPS = 12
SHORT = f"schedule.steps={STEPS}"
SAVE = "run.save_every=3"
RESUME = "run.resume=true"
# Every rank draws its own stochastic depth, so comparisons between numbers of ranks disable it.
EXACT = ("model.vision.drop_path=0",)

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["warm"])


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Faults to inject into a rank. Steps are counted from 1; 0 injects nothing.

    Attributes:
        kill_step: step that the rank kills itself in.
        kill_at: moment of the kill: `step`, at the start of the step; `saved`, the same once the
            previous checkpoint is complete; or during that step's checkpoint, `shard` after the
            tensors are written, `rename` before the folder gets its name, `last` before `LAST`
            names it.
        signal_step: step that the rank sends itself SIGTERM in.
        pause: seconds to sleep in every step.
        limit_step: step from which files larger than `limit` bytes cannot be written.
        limit: bytes.
    """

    kill_step: int = 0
    kill_at: str = "step"
    signal_step: int = 0
    pause: float = 0.0
    limit_step: int = 0
    limit: int = 100_000


@dataclass(frozen=True)
class Job:
    """The ranks of one run; `errors` is the stem of the files with their standard error."""

    ranks: list[ForkServerProcess]
    errors: Path

    def wait(self, timeout: float = 60) -> list[int | None]:
        """Waits for all ranks, then kills those still running; their exit status is None."""
        end = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        found = [rank.exitcode for rank in self.ranks]
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return found

    def stderr(self, rank: int = 0) -> str:
        return self.errors.with_suffix(f".{rank}.err").read_text()


def fork(target: Callable[..., None], ranks: Sequence[Sequence[Any]], errors: Path) -> Job:
    """Forks one process per rank with torchrun's environment; each calls `target(*ranks[rank])`."""
    folder = str(Path(__file__).parent)
    with mock.patch.dict(os.environ, PYTHONPATH=folder, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()  # imports `warm` from this folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = Job([], errors)
    for rank, arguments in enumerate(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(ranks), "MASTER_PORT": port}
        log = errors.with_suffix(f".{rank}.err")
        process = _CONTEXT.Process(
            target=_rank_main, args=(target, arguments, place, log), daemon=True
        )
        process.start()
        job.ranks.append(process)
    return job


def _rank_main(
    target: Callable[..., None], arguments: Sequence[Any], place: dict[str, int], log: Path
) -> None:
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    target(*arguments)


def start(
    out_dir: Path,
    *settings: str,
    recipe: Path = TINY,
    ranks: int = 1,
    faults: Sequence[Faults] = (),
) -> Job:
    """Starts a run; `faults` are by rank."""
    arguments = [str(recipe)]
    shared = [SHORT] if recipe == TINY else []
    for setting in (f"run.out_dir={out_dir}", "run.workers=1", *shared, *settings):
        arguments += ["--set", setting]
    faults = [*faults, *[Faults()] * (ranks - len(faults))]
    each = [(arguments, rank, fault) for rank, fault in enumerate(faults)]
    return fork(_run, each, out_dir.with_suffix(".job"))


def finish(
    out_dir: Path,
    *settings: str,
    recipe: Path = TINY,
    ranks: int = 1,
    faults: Sequence[Faults] = (),
) -> None:
    """Runs to the end and checks that all ranks succeed."""
    job = start(out_dir, *settings, recipe=recipe, ranks=ranks, faults=faults)
    assert job.wait() == [0] * ranks, job.stderr()


def steps(out_dir: Path) -> dict[int, tuple[float, float, float]]:
    """Loss, gradient norm and learning rate by step; each step must be recorded once."""
    found = {}
    for line in (out_dir / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "train":
            assert event["step"] not in found
            found[event["step"]] = (event["loss"], event["grad_norm"], event["lr"])
    return found


def names(out_dir: Path) -> dict[int, set[str]]:
    """The sample names of each step, one entry per distinct sequence."""
    found: dict[int, set[str]] = {}
    for line in (out_dir / "names.txt").read_text().splitlines():
        step, _, samples = line.partition(" ")
        found.setdefault(int(step), set()).add(samples)
    return found


def _run(arguments: list[str], rank: int, faults: Faults) -> None:
    watch_steps(faults, rank)
    _watch_checkpoints(faults)
    sys.exit(main(arguments))


def watch_steps(faults: Faults, rank: int) -> None:
    """Injects faults into `Trainer.step`; rank 0 also records the names of samples."""
    step = Trainer.step

    def watched(self: Trainer, parts: Any) -> Any:
        number = self.done + 1
        if faults.kill_step == number and faults.kill_at in ("step", "saved"):
            if faults.kill_at == "saved":
                self.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        if faults.signal_step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        if faults.limit_step == number:
            self.checkpoints.wait()  # the previous one is not limited
            resource.setrlimit(resource.RLIMIT_FSIZE, (faults.limit, faults.limit))
        time.sleep(faults.pause)
        if rank == 0:
            samples = ",".join(name for part in parts for name in part.names)
            self.out_dir.mkdir(parents=True, exist_ok=True)
            with (self.out_dir / "names.txt").open("a") as file:
                file.write(f"{number} {samples}\n")
        return step(self, parts)

    Trainer.step = watched  # type: ignore[method-assign]


def _watch_checkpoints(faults: Faults) -> None:
    name = step_name(faults.kill_step)

    def kill(moment: str, function: str, when: Callable[..., bool]) -> None:
        original = getattr(files, function)

        def watched(*arguments: Any) -> Any:
            if faults.kill_at == moment and when(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(files, function, watched)

    kill("shard", "entry_of", lambda path: name in path.parent.name)
    kill("rename", "sync_folder", lambda path: path.name == f".{name}.tmp")
    kill("last", "write_text", lambda path, text: path.name == LAST and name in text)


def run_here(config: TrainConfig) -> Trainer:
    """Runs in this process."""
    with process_group("cpu") as group:
        trainer = Trainer(config, make_task(config), group)
        trainer.run()
    return trainer


def checkpoints(config: TrainConfig) -> Path:
    """Returns the folder of a run's checkpoints."""
    return Path(config.run.out_dir) / "checkpoints"
