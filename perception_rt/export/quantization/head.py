"""Measures whether a decoder's head can take fp8."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perception_rt.export.quantization.rounding import as_e4m3, fp8_rows
from perception_rt.export.quantization.sensitivity import Measured

LEAST_AGREEMENT = 0.99  # share of the tokens whose likeliest successor stays the same


class MeasuredHead:
    """Measures fp8 on a decoder's head, which is read in pieces.

    Noise on the head is noise on the logits, so besides the error it counts how often another token
    becomes the likeliest.
    """

    def __init__(self, tokens: Tensor) -> None:
        """Measures on normalised hidden states, float32 (1, T, C)."""
        self._largest = tokens.abs().amax()
        self._rounded = as_e4m3(tokens, self._largest)
        self._likeliest = torch.full((2, 2, tokens.shape[1]), -math.inf)  # exact, fp8: logit, id
        self._squares = torch.zeros(2)  # sums over the difference and over the exact logits

    def add(self, exact: Tensor, weight: Tensor, start: int) -> None:
        """Adds a piece of the head.

        Args:
            exact: logits of the tokens in float32, (1, T, O).
            weight: rows of the head, (O, C).
            start: index of the first row.
        """
        rounded = F.linear(self._rounded, fp8_rows(weight))
        for row, logits in zip(self._likeliest, (exact[0], rounded[0]), strict=True):
            values, ids = logits.max(dim=-1)
            row[1] = torch.where(values > row[0], ids + start, row[1])
            row[0] = torch.maximum(values, row[0])
        difference = (rounded - exact).square().sum()
        self._squares += torch.stack([difference, exact.square().sum()])

    def put(self, measured: Measured, name: str) -> None:
        """Adds the head to a measurement; rejects it if too many tokens change."""
        measured.errors[name] = float((self._squares[0] / self._squares[1]).sqrt())
        measured.largest[name] = float(self._largest)
        same = (self._likeliest[0, 1] == self._likeliest[1, 1]).float().mean()
        if not same >= LEAST_AGREEMENT:
            measured.rejected.add(name)
