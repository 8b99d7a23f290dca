"""Label propagation through a video: the masks of the first frame, carried on by dense features.

A patch takes the labels of the patches that it resembles most, in the first frame and in the last
few. Nothing is trained. Defaults are those of DINO's evaluation on DAVIS.

Legend: h w grid, C width, K labels, H W size of a mask in pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.errors import InputError
from perception_rt.processing.correspondence import Float32, unit_rows
from perception_rt.records import check_integer, check_value

Mask = NDArray[np.uint8]

_QUERIES = 512  # patches whose similarities to all of the context are in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PropagationSettings:
    """Settings of label propagation.

    Attributes:
        context_frames: latest frames that labels are taken from, beside the first frame.
        radius: rows and columns by which a patch may move between two frames of the context; 0 for
            any number.
        top_k: most similar patches whose labels are averaged.
        temperature: weights are exp(cosine / temperature).
    """

    context_frames: int = 7
    radius: int = 12
    top_k: int = 5
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_integer("context_frames", self.context_frames, 0)
        check_integer("radius", self.radius, 0)
        check_integer("top_k", self.top_k, 1)
        # Below, exp(1 / temperature) leaves float32.
        if check_value("temperature", self.temperature, float) < 0.0125:
            raise InputError(f"temperature must be at least 0.0125, not {self.temperature}")


class LabelPropagation:
    """Carries the mask of the first frame on, frame by frame.

    Args:
        dense: features of the first frame, float (h, w, C).
        mask: uint8 (H, W), 0 for the background and a number for each object; its size is that of
            the results, and its proportions are those of the frames.
        settings: None for the defaults.
    """

    def __init__(
        self, dense: NDArray[Any], mask: Mask, settings: PropagationSettings | None = None
    ) -> None:
        self._settings = PropagationSettings() if settings is None else settings
        self._grid = dense.shape[:2]
        self._size = mask.shape
        self._numbers = np.unique(np.append(mask, np.uint8(0)))
        self._first = (unit_rows(dense), self._cell_labels(mask))
        self._latest: deque[tuple[Float32, Float32]] = deque(maxlen=self._settings.context_frames)

    def next_mask(self, dense: NDArray[Any]) -> Mask:
        """The mask of the next frame, uint8 (H, W), from its features, float (h, w, C)."""
        if dense.shape[:2] != self._grid:
            raise InputError(f"features must be of the grid {self._grid}, not {dense.shape[:2]}")
        rows = unit_rows(dense)
        context = [self._first, *self._latest]
        keys = np.concatenate([features for features, _ in context])
        labels = np.concatenate([shares for _, shares in context])
        found = np.concatenate(
            [
                self._propagate(rows, np.arange(start, min(start + _QUERIES, len(rows))), keys)
                @ labels
                for start in range(0, len(rows), _QUERIES)
            ]
        )
        self._latest.append((rows, found))
        return self._as_mask(found)

    def _propagate(self, rows: Float32, queries: NDArray[np.int64], keys: Float32) -> Float32:
        """Weight of each patch of the context for some patches, float32 (queries, keys)."""
        settings = self._settings
        weights: Float32 = np.exp(rows[queries] @ keys.T / np.float32(settings.temperature))
        if settings.radius:
            near = self._neighbours(queries)  # (queries, h * w)
            weights *= np.tile(near, len(keys) // len(rows))
        if settings.top_k < weights.shape[1]:
            least = np.partition(weights, -settings.top_k, axis=1)[:, -settings.top_k, None]
            weights[weights < least] = 0
        weights /= weights.sum(axis=1, keepdims=True)
        return weights

    def _neighbours(self, queries: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which patches of a frame are within the radius of some patches."""
        height, width = self._grid
        rows, columns = np.divmod(np.arange(height * width), width)
        row, column = rows[queries, None], columns[queries, None]
        distances = np.maximum(np.abs(rows - row), np.abs(columns - column))
        near: NDArray[np.bool_] = distances <= self._settings.radius
        return near

    def _cell_labels(self, mask: Mask) -> Float32:
        """Share of each label in each patch, float32 (h * w, K)."""
        height, width = self._grid
        shares = [
            np.asarray(
                Image.fromarray((mask == number).astype(np.float32)).resize(
                    (width, height), Image.Resampling.BOX
                )
            ).reshape(-1)
            for number in self._numbers
        ]
        return np.stack(shares, axis=1)

    def _as_mask(self, labels: Float32) -> Mask:
        """The likeliest label of each pixel, of labels (h * w, K) interpolated between patches.

        Each label is stretched to 0 to 1 over the frame, so that small objects are not lost.
        """
        size = self._size[1], self._size[0]
        planes = []
        for shares in labels.T:
            grid = np.ascontiguousarray(shares.reshape(self._grid))
            plane = np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BILINEAR))
            if (most := plane.max()) > 0:
                least = plane.min()
                plane = (plane - least) / max(most - least, np.float32(1e-12))
            planes.append(plane)
        best: Mask = self._numbers[np.argmax(planes, axis=0)]
        return best


def track_masks(
    features: Iterable[NDArray[Any]], first: Mask, settings: PropagationSettings | None = None
) -> Iterator[Mask]:
    """Yields the mask of each frame, uint8 (H, W); that of the first frame is `first`.

    Args:
        features: dense features of each frame, float (h, w, C).
        first: mask of the first frame, uint8 (H, W), 0 for the background.
        settings: None for the defaults.
    """
    propagation: LabelPropagation | None = None
    for dense in features:
        if propagation is None:
            propagation = LabelPropagation(dense, first, settings)
            yield first
        else:
            yield propagation.next_mask(dense)
