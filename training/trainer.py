"""The training loop, shared by all tasks.

A step is a pure function of the weights, the optimizer's moments, the step number and the data
position, so a resumed run ends with the same bits as an uninterrupted one. File formats and
sharding are elsewhere (`checkpoint/`, `parallel.py`).
"""

import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from perception_rt.errors import PerceptionError
from training import parallel
from training.atomic_files import METRICS_FILE, RECIPE_FILE, write_text
from training.checkpoint.store import Checkpoints, full_weights, require_startable
from training.distributed import Group, expected_group, total
from training.metrics import Meter, MetricsLog
from training.model.export import WEIGHTS_FILE
from training.optim import (
    build_optimizer,
    learning_rate,
    set_learning_rate,
    trained_parameters,
)
from training.recipe.schema import TrainConfig
from training.signals import StopRequest, stop_requests
from training.tasks.task import MicroBatch, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Mean loss, gradient norm before clipping, and learning rate of one step."""

    loss: float
    grad_norm: float
    lr: float


def check(config: TrainConfig, task: Task) -> None:
    """Finds the mistakes of a recipe that its run would meet after the process group has started.

    Raises:
        InputError: `run.out_dir` is in use, a file is missing, or ranks or model do not fit.
        CheckpointError: the run to be resumed computes something else.
    """
    require_startable(config)
    group = expected_group(config.run.device, config.parallel.tensor)
    task.check(group)
    with torch.device("meta"):
        model = task.learner().model
    freeze(model, task)
    trained_parameters(model.named_parameters(), config.optim)
    parallel.require_fit(model, config.parallel, group)


def freeze(model: nn.Module, task: Task) -> None:
    """Excludes parameters from training that the task does not train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(task.trainable(name))


class Trainer:
    """Trains one model on one or more ranks.

    Args:
        config: the recipe.
        task: the recipe's task.
        group: this process's place among the ranks.
    """

    def __init__(self, config: TrainConfig, task: Task, group: Group) -> None:
        torch.set_num_threads(config.run.threads or group.fair_threads)
        self.config = config
        self.task = task
        self.group = group
        self.out_dir = Path(config.run.out_dir)
        self.stream = task.stream(group)
        with torch.device("meta"):
            self.learner = task.learner()
        freeze(self.model, task)
        parallel.prepare(self.learner, config.parallel, group)
        parallel.fill(self.model, task.initial)
        self.learner.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model.named_parameters(), config.optim)
        self.checkpoints = Checkpoints(self.out_dir, config, group)
        # Number of finished steps.
        self.done = self.checkpoints.resume(self.learner, self.optimizer, self.stream)

    @property
    def model(self) -> nn.Module:
        """The trained module, with parameters named as in checkpoints."""
        return self.learner.model

    def run(self) -> None:
        """Trains to the last step and exports the weights, or stops and saves after a signal.

        Raises:
            PerceptionError: a step failed, or a checkpoint could not be saved.
        """
        log = self._open_log()
        if self.done == self.config.schedule.steps and self.group.is_main:
            print(f"all {self.done} steps are done; raise schedule.steps to train on", flush=True)
        elif self.done and self.group.is_main:
            # Weights from before the extension: an interrupted run must not leave them.
            (self.out_dir / WEIGHTS_FILE).unlink(missing_ok=True)
        with stop_requests() as request:
            try:
                self._train(log, request)
                self._save()
                self.checkpoints.wait()
            finally:
                self.checkpoints.close()
                self.stream.close()
        if self.done < self.config.schedule.steps:
            if self.group.is_main:
                print(f"stopped after step {self.done}; continue with run.resume=true", flush=True)
            return
        weights = full_weights(self.learner, keep=self.group.is_main)
        if self.group.is_main:
            self.task.export(weights, self.out_dir)

    def _train(self, log: MetricsLog | None, request: StopRequest) -> None:
        """Runs steps until the last one, or until any rank is asked to stop."""
        run = self.config.run
        meter = Meter(self.config, self.model, self.group)
        while self.done < self.config.schedule.steps:
            began = time.perf_counter()
            parts = self.stream.next()
            result = self.step(parts)
            meter.add(parts, time.perf_counter() - began)
            if self._due(run.log_every):
                self._report(log, result, meter)
            if self._due(run.eval_every):
                with parallel.unsharded(self.learner):
                    figures = self.task.evaluate(self.learner)
                if log is not None:
                    log.write("eval", self.done, figures)
            if self._due(run.save_every):
                self._save()
            if self._stops(request):
                break

    def step(self, parts: Sequence[MicroBatch]) -> StepResult:
        """Runs one step on this rank's parts of the batch.

        Raises:
            PerceptionError: the loss or the gradient norm is not finite, or the norm exceeds
                `optim.stop_above`. The weights are then unchanged.
        """
        lr = learning_rate(self.done, self.config.optim.lr, self.config.schedule)
        weight = total(torch.tensor(sum(part.weight for part in parts)), self.group).item()
        # Backward averages gradients over ranks, but the loss is a sum over ranks.
        scale = self.group.ranks / max(1.0, float(weight))
        loss = torch.zeros((), device=self.group.device)
        self.optimizer.zero_grad()
        for index, part in enumerate(parts):
            self._seed(index)
            with parallel.last_part(self.learner, index == len(parts) - 1):
                share = self.learner(part.to(self.group.device)) * scale
                share.backward()
            loss += share.detach()
        mean_loss = total(loss, self.group).item() / self.group.ranks
        self._require_sound("loss", mean_loss, parts)
        norm = parallel.clip_gradients(self.learner, self.trained, self.config, self.group)
        self._require_sound("gradient norm", norm, parts, limit=self.config.optim.stop_above)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.task.after_step(self.model)
        self.done += 1
        return StepResult(loss=mean_loss, grad_norm=norm, lr=lr)

    def _seed(self, part: int) -> None:
        """Derives all random state from (seed, step, part, rank), so none is saved."""
        entropy = (self.config.run.seed, self.done, part, self.group.rank)
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - a dependency may use the global generator
        random.seed(seed)

    def _due(self, every: int) -> bool:
        """Whether an action with this interval in steps is due; an interval of 0 means never."""
        return every > 0 and self.done % every == 0

    def _save(self) -> None:
        self.checkpoints.save(self.done, self.learner, self.optimizer, self.stream)

    def _stops(self, request: StopRequest) -> bool:
        """Whether any rank was asked to stop; CheckpointError if a save failed on any."""
        flags = torch.tensor([bool(request), self.checkpoints.failed], dtype=torch.int32)
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group.control)
        stop, failed = flags.tolist()
        if failed:
            self.checkpoints.wait()
        return bool(stop)

    def _open_log(self) -> MetricsLog | None:
        """Creates `out_dir` with recipe and metrics; returns None on all ranks but the main one."""
        if not self.group.is_main:
            return None
        self.out_dir.mkdir(parents=True, exist_ok=True)
        write_text(self.out_dir / RECIPE_FILE, self.config.to_yaml())
        log = MetricsLog(
            self.out_dir / METRICS_FILE,
            step=self.done,
            screen=sys.stdout,
            tensorboard=self.config.run.tensorboard,
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.trained)
        facts = {"ranks": self.group.ranks, "parameters": parameters, "trained": trained}
        log.write("start", self.done, facts)
        return log

    def _report(self, log: MetricsLog | None, result: StepResult, meter: Meter) -> None:
        if log is None:
            return
        bad = {"bad_samples": self.stream.bad_samples} if self.stream.bad_samples else {}
        log.write("train", self.done, {**asdict(result), **bad, **meter.figures(self.done)})

    def _require_sound(
        self, name: str, value: float, parts: Sequence[MicroBatch], *, limit: float | None = None
    ) -> None:
        """Raises PerceptionError for an unsound value, after saving the samples' names."""
        above = limit is not None and value > limit
        if math.isfinite(value) and not above:
            return
        step = self.done + 1
        names = [sample for part in parts for sample in part.names]
        self.out_dir.mkdir(parents=True, exist_ok=True)
        file = self.out_dir / f"failed_step_{step}_rank_{self.group.rank}.json"
        write_text(file, json.dumps({"step": step, name: str(value), "samples": names}))
        why = f"{value:.5g}, above optim.stop_above {limit}" if above else f"{value}"
        raise PerceptionError(
            f"step {step}: the {name} is {why}; training stopped, its samples are in {file.name}"
        )
