"""Turns frames as their file's display matrix says: eight orientations, with and without mirror.

Legend: H height, W width.
"""

import struct
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Turn: TypeAlias = tuple[bool, bool, bool]
IDENTITY: Turn = (False, False, False)

_DOMINATES = 64  # a matrix is of a quarter turn if its other elements are smaller by this factor


def read_matrix(data: bytes) -> Turn:
    """Reads a display matrix of FFmpeg.

    Its elements a, b, c, d map a pixel at x, y to (a x + c y, b x + d y), with y downwards.

    Args:
        data: nine native int32: a, b, 0, c, d, 0, and three that do not matter here.

    Returns:
        Whether to swap rows and columns, and whether to reverse the rows and the columns
        afterwards. `IDENTITY` for an angle that is no multiple of a quarter turn.
    """
    if len(data) != 36:
        return IDENTITY
    a, b, _, c, d = struct.unpack_from("=5i", data)
    if min(abs(a), abs(d)) > _DOMINATES * max(abs(b), abs(c)):
        return False, d < 0, a < 0
    if min(abs(b), abs(c)) > _DOMINATES * max(abs(a), abs(d)):
        return True, b < 0, c < 0
    return IDENTITY


def is_mirrored(how: Turn) -> bool:
    """Whether more than a rotation is needed."""
    swap, reverse_rows, reverse_columns = how
    return swap ^ reverse_rows ^ reverse_columns


def turn(pixels: NDArray[np.uint8], how: Turn) -> NDArray[np.uint8]:
    """Turns a frame, (H, W, 3) or (W, H, 3), into a view of its pixels."""
    swap, reverse_rows, reverse_columns = how
    if swap:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1]
