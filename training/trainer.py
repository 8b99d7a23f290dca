"""The training loop: contrastive learning of a Perception Encoder.

A step is a pure function of the weights, the optimizer's moments and the step's number, so an
interrupted run that resumes ends with the same bits. Knows nothing of file formats.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from perception_rt.errors import InputError, PerceptionError
from perception_rt.models.pe import PerceptionEncoder
from training import state
from training.config import TrainConfig
from training.data import DigitStream, check_shares, validation_digits
from training.distributed import Group, average, average_gradients
from training.evaluation import evaluate
from training.losses import contrastive_loss
from training.metrics import MetricsLog
from training.optim import build_optimizer, learning_rate, set_learning_rate
from training.weights import initialise

MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step reports: mean loss, gradient norm before clipping, and learning rate."""

    loss: float
    grad_norm: float
    lr: float


class Trainer:
    """Trains one model by one recipe, on one or more ranks.

    Args:
        config: the recipe.
        group: this process's place among the ranks.
    """

    def __init__(self, config: TrainConfig, group: Group) -> None:
        check_shares(config.data, group.ranks)
        torch.set_num_threads(config.run.threads)
        torch.manual_seed(config.run.seed)
        self.config = config
        self.group = group
        self.out_dir = Path(config.run.out_dir)
        self.model = PerceptionEncoder(config.model)
        initialise(self.model)
        self.model.train()
        self.optimizer = build_optimizer(self.model, config.optim)
        self.data = DigitStream(config.data, config.model, seed=config.run.seed)
        self.done = self._resume()  # finished steps

    def run(self) -> None:
        """Trains to the last step, then exports the weights."""
        run, batch_size = self.config.run, self.config.data.batch_size
        log = self._open_log()
        images, seconds = 0, 0.0  # since the last progress line
        while self.done < self.config.schedule.steps:
            began = time.perf_counter()
            result = self.step()
            images, seconds = images + batch_size, seconds + time.perf_counter() - began
            if log is None:
                continue
            if self._due(run.log_every):
                log.write("train", self.done, {**asdict(result), "images_per_s": images / seconds})
                images, seconds = 0, 0.0
            if self._due(run.eval_every):
                digits = validation_digits(self.config.data)
                log.write("eval", self.done, evaluate(self.model, digits))
            if self._due(run.save_every):
                self._save()
        if log:
            self._save()
            state.export_weights(self.model, self.out_dir / state.WEIGHTS_FILE)

    def step(self) -> StepResult:
        """Does one step on this rank's share of the batch.

        Raises:
            PerceptionError: the loss or the gradient is not finite; the weights are those before
                the step.
        """
        step, group = self.done, self.group
        lr = learning_rate(step, self.config.optim.lr, self.config.schedule)
        self._seed(step)
        batch = self.data.batch(step, rank=group.rank, ranks=group.ranks)
        loss = contrastive_loss(*self.model(batch.pixels, batch.tokens))
        mean_loss = average(loss, group).item()
        _require_finite("loss", mean_loss, step)
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.model.parameters(), group)
        clip = self.config.optim.clip
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip).item()
        _require_finite("gradient norm", norm, step)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        self.done += 1
        return StepResult(loss=mean_loss, grad_norm=norm, lr=lr)

    def _seed(self, step: int) -> None:
        """Makes stochastic depth a function of (seed, step, rank): no generator state to save."""
        entropy = (self.config.run.seed, step, self.group.rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))

    def _due(self, every: int) -> bool:
        """Whether something that happens every so many steps, 0 for never, happens now."""
        return every > 0 and self.done % every == 0

    def _resume(self) -> int:
        """Loads the state in `out_dir` on demand; returns the number of finished steps."""
        path = self.out_dir / state.STATE_FILE
        if not self.config.run.resume:
            if path.exists():
                raise InputError(
                    f"run.out_dir {self.config.run.out_dir} holds a run; "
                    "continue it with --set run.resume=true, or choose another"
                )
            return 0
        if not path.exists():
            return 0
        return state.load_state(
            path, model=self.model, optimizer=self.optimizer, config=self.config
        )

    def _open_log(self) -> MetricsLog | None:
        """Prepares `out_dir`; the main rank only."""
        if not self.group.is_main:
            return None
        self.out_dir.mkdir(parents=True, exist_ok=True)
        state.write_text(self.out_dir / state.RECIPE_FILE, self.config.to_yaml())
        log = MetricsLog(self.out_dir / state.METRICS_FILE, step=self.done, screen=sys.stdout)
        parameters = sum(p.numel() for p in self.model.parameters())
        log.write("start", self.done, {"ranks": self.group.ranks, "parameters": parameters})
        return log

    def _save(self) -> None:
        state.save_state(
            self.out_dir / state.STATE_FILE,
            step=self.done,
            model=self.model,
            optimizer=self.optimizer,
            config=self.config,
        )


def _require_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise PerceptionError(f"step {step + 1}: the {name} is {value}; training stopped")
