"""Packs samples side by side into sequences of equal length.

No sample attends to another, and each has its own positions, so a packed sample has the same loss
as alone.

Legend: N sequences, T tokens of a sequence, I tiles, S tile side in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100  # label of a token that the loss does not count
PADDING = -1  # document index of a padding token


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One encoded conversation.

    Attributes:
        tokens: token ids, int64 (T,), with the image token's id in place of image features.
        labels: int64 (T,), the token where the loss counts it and `IGNORED` elsewhere.
        tiles: uint8 (n, S, S, 3), in the order of their tokens.
        name: sample name for error reports.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    tiles: NDArray[np.uint8]
    name: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LanguageBatch:
    """Packed sequences.

    Attributes:
        tokens: token ids, int64 (N, T), padded with zeros.
        labels: next token, int64 (N, T); `IGNORED` where the loss does not count it.
        positions: position of each token in its sample, int64 (N, T).
        documents: index of each token's sample in its sequence, int64 (N, T); `PADDING` for none.
        tiles: tiles of all sequences in order, uint8 (I, S, S, 3).
        names: sample names.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor
    tiles: Tensor
    names: tuple[str, ...] = field(default=())

    @property
    def weight(self) -> int:
        """Number of tokens that the loss counts."""
        return int((self.labels != IGNORED).sum())

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of tokens without padding, of tiles (`images`) and of samples."""
        tokens = int((self.documents != PADDING).sum())
        return {"tokens": tokens, "images": len(self.tiles), "samples": len(self.names)}

    def to(self, device: torch.device) -> "LanguageBatch":
        """Copies the batch to a device."""
        return LanguageBatch(
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            positions=self.positions.to(device),
            documents=self.documents.to(device),
            tiles=self.tiles.to(device),
            names=self.names,
        )


def collate(rows: Sequence[Sequence[Sample]], length: int) -> LanguageBatch:
    """Packs rows of samples; the samples of a row have at most `length` tokens together."""
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
            # A token predicts the next one; the last token of a sample predicts nothing.
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
