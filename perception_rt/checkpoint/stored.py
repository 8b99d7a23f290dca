"""Converts one tensor to and from a checkpoint layout: keys, splits, transposes, row orders.

Legend: H heads, E channels per head, C input channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The entry of one of our tensors in a layout.

    Attributes:
        name: our name.
        shape: our shape.
        keys: keys of the layout; several are parts along the first axis.
        shapes: shape under each key.
        transposed: whether the layout stores the transpose of our matrix.
        head_dim: channels per head if the layout rotates channel i with channel i + E/2, and so
            stores a head's even rows before its odd rows; we rotate adjacent channels. Else None.
    """

    name: str
    shape: Shape
    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transposed: bool = False
    head_dim: int | None = None

    @property
    def has_our_rows(self) -> bool:
        """Whether there is one stored tensor with the same rows as ours."""
        return self.shapes == (self.shape,) and not self.transposed and self.head_dim is None

    def unpack(self, parts: Sequence[Tensor]) -> Tensor:
        """Converts the tensors under `keys` to ours, contiguous; a view where possible."""
        tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.head_dim is not None:
            return _as_pairs(tensor, self.head_dim)
        return (tensor.T if self.transposed else tensor).reshape(self.shape).contiguous()

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Converts our tensor to those under `keys`; copies only split or reordered tensors."""
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
    """Reorders rows (H*E, C) from adjacent rotated pairs to pairs that are E/2 apart."""
    heads = tensor.reshape(-1, head_dim // 2, 2, tensor.shape[1])  # (H, E/2, 2, C)
    # (H, 2, E/2, C) -> (H*E, C)
    return heads.transpose(1, 2).reshape(tensor.shape)


def _as_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `_as_halves`."""
    heads = tensor.reshape(-1, 2, head_dim // 2, tensor.shape[1])  # (H, 2, E/2, C)
    # (H, E/2, 2, C) -> (H*E, C)
    return heads.transpose(1, 2).reshape(tensor.shape)
