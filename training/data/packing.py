"""Samples of conversations side by side in sequences of one length.

No sample attends to another, and each has its own positions, so a packed sample has the loss that
it has alone. Knows nothing of files and formats.

Legend: N sequences, T tokens of a sequence, I tiles, S tile side in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100  # the label of a token that has no loss
PADDING = -1  # the document of a token that is in none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One conversation as the model sees it.

    Attributes:
        tokens: int64 (T,), with the image token's id where features go.
        labels: int64 (T,): the token itself where it is learned, `IGNORED` elsewhere.
        tiles: uint8 (n, S, S, 3), in the order of their tokens.
        name: for whoever must find it.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    tiles: NDArray[np.uint8]
    name: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LanguageBatch:
    """Sequences of samples.

    Attributes:
        tokens: int64 (N, T), padded with zeros.
        labels: int64 (N, T): what comes next, `IGNORED` where that is not learned.
        positions: int64 (N, T), of each token in its sample.
        documents: int64 (N, T), the sample that a token belongs to; `PADDING` for none.
        tiles: uint8 (I, S, S, 3) of all sequences in order.
        names: of the samples.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor
    tiles: Tensor
    names: tuple[str, ...] = field(default=())

    @property
    def weight(self) -> int:
        """Tokens that are learned."""
        return int((self.labels != IGNORED).sum())

    @property
    def counts(self) -> Mapping[str, int]:
        """Tokens, without padding; tiles; samples."""
        tokens = int((self.documents != PADDING).sum())
        return {"tokens": tokens, "images": len(self.tiles), "samples": len(self.names)}

    def to(self, device: torch.device) -> "LanguageBatch":
        """The same on a device."""
        return LanguageBatch(
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            positions=self.positions.to(device),
            documents=self.documents.to(device),
            tiles=self.tiles.to(device),
            names=self.names,
        )


def collate(rows: Sequence[Sequence[Sample]], length: int) -> LanguageBatch:
    """Rows of samples, each row at most `length` tokens in all, to a batch."""
    shape = (len(rows), length)
    tokens = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    positions = torch.zeros(shape, dtype=torch.int64)
    documents = torch.full(shape, PADDING)
    for index, row in enumerate(rows):
        start = 0
        for document, sample in enumerate(row):
            stop = start + len(sample.tokens)
            assert stop <= length
            tokens[index, start:stop] = torch.from_numpy(sample.tokens)
            # A token predicts the one after it; the last of a sample predicts nothing.
            labels[index, start : stop - 1] = torch.from_numpy(sample.labels[1:])
            positions[index, start:stop] = torch.arange(stop - start)
            documents[index, start:stop] = document
            start = stop
    samples = [sample for row in rows for sample in row]
    return LanguageBatch(
        tokens=tokens,
        labels=labels,
        positions=positions,
        documents=documents,
        tiles=torch.from_numpy(np.concatenate([sample.tiles for sample in samples])),
        names=tuple(sample.name for sample in samples),
    )
