"""Formats of quantised linear weights.

- `int8`: W8A8; weights symmetric per output channel, activations asymmetric uint8 per tensor,
  scaled at run time.
- `int8_rows`: the same weights; activations symmetric per row, so that a token's result depends on
  no other token, and its integer sums are exact in any batch.
- `int8_blocks`, `int4_blocks`: weights symmetric per block of 32 input channels.
- `fp8`: E4M3 numbers; weights scaled per output channel, activations per tensor by their calibrated
  range.

`sensitivity.py` measures which layers can take which format.

Legend: O output channels, C input channels, B blocks of 32 channels.
"""

from typing import Any, Literal

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Format = Literal["int8", "int8_rows", "int8_blocks", "int4_blocks", "fp8"]
Scheme = Literal["int8", "int8_rows", "fp8"]

BLOCK = 32
BITS = {"int8_blocks": 8, "int4_blocks": 4}
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = 448.0
INT8_MAX = 127.0


def channel_scale(weight: Array, largest: float) -> Array:
    """Scales, float32 (O,), by which each row of a weight (O, C) has this largest magnitude."""
    peaks = np.abs(weight).max(axis=1).astype(np.float32)
    scale: Array = np.where(peaks > 0, peaks / np.float32(largest), np.float32(1))
    return scale


def int8_channels(weight: Array) -> tuple[Array, Array]:
    """A weight (O, C) as int8 (O, C), and its scales, float32 (O,)."""
    scale = channel_scale(weight, INT8_MAX)
    return np.clip(np.rint(weight / scale[:, None]), -INT8_MAX, INT8_MAX).astype(np.int8), scale


def fp8_channels(weight: Array, scale: Array) -> Array:
    """A weight (O, C) as E4M3 (O, C), by its scales (O,) in the dtype that they are stored in."""
    scaled = weight / scale.astype(np.float32)[:, None]
    return np.clip(scaled, -FP8_MAX, FP8_MAX).astype(FP8)


def quantize_blocks(weight: Array, bits: int) -> tuple[Array, Array]:
    """Quantises a float32 weight (O, C) in blocks, each with a scale of its own.

    The largest magnitude of a block becomes -2**(bits-1), which has no positive counterpart, so
    that all steps are used.

    Returns:
        uint8 (O, B, 32 * bits / 8) of values plus 2**(bits-1), with two 4-bit values per byte, the
        low half first; scales, float32 (O, B).
    """
    rows, channels = weight.shape
    blocks = -(-channels // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :channels] = weight
    padded = padded.reshape(rows, blocks, BLOCK)
    top = 2 ** (bits - 1)
    low, high = padded.min(axis=-1), padded.max(axis=-1)
    extreme = np.where(high > -low, high, low)
    scale = (extreme / np.float32(-top)).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    padded *= inverse[..., None]
    np.rint(padded, out=padded)
    padded += top
    values = np.clip(padded, 0, 2 * top - 1, out=padded).astype(np.uint8)
    return (values if bits == 8 else values[..., ::2] | (values[..., 1::2] << 4)), scale
