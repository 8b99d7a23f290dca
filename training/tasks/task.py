"""What the training loop asks of a task: a model with its loss, data, and what to do with results.

A task's loss over a batch is a sum over parts of the batch, divided by their weights: labelled
tokens, or images. So it does not depend on how the batch is spread over ranks and parts.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from training.data.loader import LaneStream
from training.distributed import Group


class Micro(Protocol):
    """A part of a batch, as it goes to the model at once."""

    @property
    def weight(self) -> int:
        """What the sum of losses is divided by, over all parts and ranks."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What is in it, such as `images` and `tokens`, for rates."""

    @property
    def names(self) -> Sequence[str]:
        """Its samples, for whoever must find out what went wrong."""

    def to(self, device: torch.device) -> Self:
        """The same on a device."""


class Learner(nn.Module, ABC):
    """A model and its loss. `model` has the parameters, under the names of checkpoints."""

    model: nn.Module

    @abstractmethod
    def forward(self, micro: Any) -> Tensor:
        """The sum of the losses of a part of a batch, a scalar."""


class Task(ABC):
    """One kind of training. Made on every rank, from the recipe."""

    @abstractmethod
    def learner(self) -> Learner:
        """A new learner, on the device that is torch's default: `meta` among others."""

    @abstractmethod
    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """All of a parameter's first value, float32 on the CPU: read, or drawn by `generator`."""

    @abstractmethod
    def stream(self, group: Group) -> LaneStream[Any, Any]:
        """This rank's data from the beginning."""

    @abstractmethod
    def evaluate(self, learner: Learner) -> dict[str, float]:
        """Figures for the record, by name. Called on every rank."""

    @abstractmethod
    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes all of a model's weights as `perception-export --checkpoint` takes them."""

    def trainable(self, name: str) -> bool:
        """Whether a parameter is trained; a frozen one gets no gradient and no moments."""
        return True

    def after_step(self, model: nn.Module) -> None:  # noqa: B027 - most tasks have nothing to do
        """Keeps weights within bounds."""
