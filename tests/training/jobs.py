"""Training runs in processes of their own, for tests that kill them.

The processes are forks of one that has imported everything, so that starting one takes a moment.
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
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from training.checkpoint import files
from training.checkpoint.files import LAST, step_name
from training.distributed import process_group
from training.recipe.schema import TrainConfig
from training.tasks.registry import make_task
from training.train import main
from training.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
TINY = CONFIGS / "pe_tiny.yaml"
SAVE = "run.save_every=5"
GO_ON = "run.resume=true"
# Stochastic depth is drawn per rank, so what is compared between numbers of ranks is without it.
EXACT = "model.vision.drop_path=0"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["training.train", "sklearn.datasets", "torch._dynamo"])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the processes inherit it


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong in a run, and when: at the step of that number, counted from 1.

    `kill_at` is `step`; or `saved`, when the checkpoint before is whole; or a moment of the
    checkpoint of `kill_step`: `shard` when it is written, `rename` before it has its name, `last`
    before `LAST` names it. `signal_step` sends SIGTERM to itself. `pause` seconds are slept in
    every step. `limit_step` limits the size of files to `limit` bytes.
    """

    kill_step: int = 0
    kill_at: str = "step"
    signal_step: int = 0
    pause: float = 0.0
    limit_step: int = 0
    limit: int = 100_000


@dataclass(frozen=True)
class Job:
    """The ranks of one run."""

    ranks: list[ForkServerProcess]
    errors: Path

    def wait(self, timeout: float = 60) -> list[int | None]:
        """The exit statuses; None for a rank that is still running, which is then killed."""
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


def start(
    out_dir: Path,
    *settings: str,
    recipe: Path = TINY,
    ranks: int = 1,
    faults: Sequence[Faults] = (),
) -> Job:
    """Begins a run; `faults` are by rank."""
    arguments = [str(recipe)]
    for setting in (f"run.out_dir={out_dir}", "run.workers=1", *settings):
        arguments += ["--set", setting]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    faults = [*faults, *[Faults()] * (ranks - len(faults))]
    job = Job([], out_dir.with_suffix(".job"))
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        log = job.errors.with_suffix(f".{rank}.err")
        arguments_of = (arguments, place, log, faults[rank])
        process = _context.Process(target=_run, args=arguments_of, daemon=True)
        process.start()
        job.ranks.append(process)
    return job


def finish(
    out_dir: Path,
    *settings: str,
    recipe: Path = TINY,
    ranks: int = 1,
    faults: Sequence[Faults] = (),
) -> None:
    """A run that ends well."""
    job = start(out_dir, *settings, recipe=recipe, ranks=ranks, faults=faults)
    assert job.wait() == [0] * ranks, job.stderr()


def steps(out_dir: Path) -> dict[int, tuple[float, float, float]]:
    """Loss, gradient norm and learning rate by step, each step once."""
    found = {}
    for line in (out_dir / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "train":
            assert event["step"] not in found
            found[event["step"]] = (event["loss"], event["grad_norm"], event["lr"])
    return found


def names(out_dir: Path) -> dict[int, set[str]]:
    """The sequences of samples of each step, as often as it was done."""
    found: dict[int, set[str]] = {}
    for line in (out_dir / "names.txt").read_text().splitlines():
        step, _, samples = line.partition(" ")
        found.setdefault(int(step), set()).add(samples)
    return found


def _run(arguments: list[str], place: dict[str, int], log: Path, faults: Faults) -> None:
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    watch_steps(faults, place["RANK"])
    _watch_checkpoints(faults)
    sys.exit(main(arguments))


def watch_steps(faults: Faults, rank: int) -> None:
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
    """A run in this process."""
    with process_group("cpu") as group:
        trainer = Trainer(config, make_task(config), group)
        trainer.run()
    return trainer


def checkpoints(config: TrainConfig) -> Path:
    """The folder of a run's checkpoints."""
    return Path(config.run.out_dir) / "checkpoints"
