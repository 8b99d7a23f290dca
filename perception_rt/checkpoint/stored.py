"""How a layout stores one tensor, in both directions: under which keys, cut, turned or reordered.

Legend: H heads, E channels per head, C input channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a layout stores one of our tensors.

    Attributes:
        name: our name.
        shape: our shape.
        keys: the layout's keys; several are parts along the first axis.
        shapes: the shape under each key.
        transposed: the layout stores the transpose of our matrix.
        head_dim: channels per head where the layout turns channel i with channel i + E/2, and so
            has a head's even rows before its odd ones; we turn adjacent channels. None elsewhere.
    """

    name: str
    shape: Shape
    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transposed: bool = False
    head_dim: int | None = None

    @property
    def has_our_rows(self) -> bool:
        """Whether a row of ours is the same row of the one stored tensor."""
        return self.shapes == (self.shape,) and not self.transposed and self.head_dim is None

    def unpack(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensors under `keys` -> ours, contiguous; a view where that is possible."""
        tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.head_dim is not None:
            return _as_pairs(tensor, self.head_dim)
        return (tensor.T if self.transposed else tensor).reshape(self.shape).contiguous()

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensor -> the tensors under `keys`; copies only what the layout cuts or turns."""
        if self.head_dim is not None:
            return {self.keys[0]: _as_halves(tensor, self.head_dim)}
        if len(self.keys) == 1 and not self.transposed:
            return {self.keys[0]: tensor.reshape(self.shapes[0])}
        turned = tensor.T if self.transposed else tensor
        parts = torch.split(turned, [shape[0] for shape in self.shapes])
        return {
            key: part.clone(memory_format=torch.contiguous_format)
            for key, part in zip(self.keys, parts, strict=True)
        }


def _as_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """(H*E, C) whose heads turn adjacent rows -> (H*E, C) whose heads turn rows E/2 apart."""
    heads = tensor.reshape(-1, head_dim // 2, 2, tensor.shape[1])
    return heads.transpose(1, 2).reshape(tensor.shape)


def _as_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `_as_halves`."""
    heads = tensor.reshape(-1, 2, head_dim // 2, tensor.shape[1])
    return heads.transpose(1, 2).reshape(tensor.shape)
