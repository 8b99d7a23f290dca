"""Datasets of conversations: endless sequences of records, each addressed by its rank."""

from pathlib import Path
from typing import Any, Protocol

from perception_rt.errors import InputError, SampleError
from training.data.jsonl import JsonLines
from training.data.media import MediaFolders
from training.data.mixture import shuffled
from training.recipe.schema import DatasetConfig


class Dataset(Protocol):
    """An endless sequence of records. Several threads may read it.

    Attributes:
        name: name in the recipe.
        folders: folders that image and video paths are relative to.
    """

    name: str
    folders: MediaFolders

    def load(self, rank: int) -> Any:
        """Reads a record; SampleError if it is unreadable."""

    def where(self, rank: int) -> str:
        """Returns the place of a record for error reports."""


class LineDataset:
    """A jsonl dataset, shuffled anew in each epoch.

    Args:
        name: name in the recipe.
        config: the recipe's entry.
        seed: RNG seed of the order.
        kept: lines at the end that are kept for validation.
        validation: read the kept lines instead of the others.

    Raises:
        InputError: the files are missing or empty, or have too few lines.
    """

    def __init__(
        self, name: str, config: DatasetConfig, seed: int, kept: int, *, validation: bool
    ) -> None:
        self.name = name
        annotation = Path(config.annotation)
        self.folders = MediaFolders.of(config.root, annotation)
        self._lines = JsonLines(annotation, name)
        self._first = len(self._lines) - kept if validation else 0
        self._size = kept if validation else len(self._lines) - kept
        self._seed = seed
        if len(self._lines) <= kept:
            raise InputError(
                f"dataset {name!r:.60} has {len(self._lines)} lines; data.validation keeps "
                f"{kept} of them from training; lower it"
            )

    def load(self, rank: int) -> Any:
        """See `Dataset.load`."""
        try:
            return self._lines.load(self._number(rank))
        except InputError as error:
            raise SampleError("a line cannot be read", str(error)) from None

    def where(self, rank: int) -> str:
        """See `Dataset.where`."""
        return self._lines.where(self._number(rank))

    def _number(self, rank: int) -> int:
        epoch, index = divmod(rank, self._size)
        return self._first + shuffled(index, self._size, f"{self._seed} {epoch} {self.name}")
