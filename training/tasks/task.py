"""The interface between the training loop and a task.

The loss of a batch is the summed loss of its parts divided by their summed weights (labelled
tokens, or images). So it does not depend on how the batch is spread over ranks and parts.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from training.data.loader import LaneStream
from training.distributed import Group


class MicroBatch(Protocol):
    """The part of a batch that goes through the model at once."""

    @property
    def weight(self) -> int:
        """The part's share of the divisor of summed losses: labelled tokens, or rows."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Contents by kind, such as `images` and `tokens`, for throughput."""

    @property
    def names(self) -> Sequence[str]:
        """Sample names for error reports."""

    def to(self, device: torch.device) -> Self:
        """Copies the part to a device."""


class Learner(nn.Module, ABC):
    """A model and its loss. `model` holds the parameters, named as in checkpoints."""

    model: nn.Module

    @abstractmethod
    def forward(self, micro: Any) -> Tensor:
        """Returns the summed loss of a part of a batch, a scalar."""


class Task(ABC):
    """One kind of training. Every rank makes one from the recipe."""

    @abstractmethod
    def learner(self) -> Learner:
        """Creates a learner on torch's default device, which may be `meta`."""

    @abstractmethod
    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """Returns the whole initial value of a parameter, float32 on the CPU."""

    @abstractmethod
    def stream(self, group: Group) -> LaneStream[Any, Any]:
        """Opens this rank's data from the beginning."""

    def check(self, group: Group) -> None:
        """Opens all data once, so that a missing file is found before a run starts.

        Raises:
            InputError: a file is missing, or does not fit the recipe.
        """
        self.stream(group).close()

    @abstractmethod
    def evaluate(self, learner: Learner) -> dict[str, float]:
        """Returns evaluation figures by name. All ranks call it."""

    @abstractmethod
    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes all weights as `perception-export --checkpoint` takes them."""

    def trainable(self, name: str) -> bool:
        """Whether a parameter is trained; a frozen one has neither gradient nor moments."""
        return True

    def after_step(self, model: nn.Module) -> None:  # noqa: B027 - most tasks have nothing to do
        """Keeps weights within bounds; does nothing by default."""
