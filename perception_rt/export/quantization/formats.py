"""Formats of quantised linear weights.

- `int8`: W8A8, weights symmetric per output channel, activations asymmetric uint8 per tensor,
  scaled when the engine runs.
- `int8_rows`: the same weights, activations symmetric per row, so that a token's result depends on
  no other token, and its integer sums are exact in any batch.
- `int8_blocks`, `int4_blocks`: weights symmetric per block of 32 input channels.
- `fp8`: E4M3 numbers; weights scaled per output channel, activations per tensor, by the largest
  magnitude that calibration met.

Which layer takes which is measured (`measure.py`).

Legend: O channels out, C channels in, B blocks of 32 channels.
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


def channel_scale(weight: Array) -> Array:
    """float32 (O,) scales of a weight (O, C), such that the largest magnitude becomes 127."""
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    scale: Array = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    return scale


def quantize_channels(weight: Array, scale: Array) -> Array:
    """int8 (O, C) of a weight (O, C): the nearest multiple of each channel's scale."""
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)


def fp8_channel_scale(weight: Array) -> Array:
    """float32 (O,) scales of a weight (O, C), such that the largest magnitude becomes 448."""
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    scale: Array = np.where(largest > 0, largest / np.float32(FP8_MAX), np.float32(1))
    return scale


def fp8_channels(weight: Array, scale: Array) -> Array:
    """E4M3 (O, C) of a weight (O, C) and its scales, as those are stored."""
    scaled = weight / scale.astype(np.float32)[:, None]
    return np.clip(scaled, -FP8_MAX, FP8_MAX).astype(FP8)


def quantize_blocks(weight: Array, bits: int) -> tuple[Array, Array]:
    """A float32 weight (O, C) in blocks: whole steps of each block's own scale.

    The largest magnitude of a block becomes -2**(bits-1), the one end of the range that has no
    twin; so all steps are used.

    Returns:
        uint8 (O, B, 32 * bits / 8), each value plus 2**(bits-1), two to a byte for 4 bits, the low
        half first; float32 scales (O, B).
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
