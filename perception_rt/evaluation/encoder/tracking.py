"""Task: carry the masks of a video's first frame on by dense features.

Legend: H W size of a mask in pixels.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.bulk.listing import Item
from perception_rt.errors import InputError
from perception_rt.evaluation.data.masked import MaskedImage, read_masked
from perception_rt.evaluation.encoder.dense import dense_features
from perception_rt.evaluation.metrics.tracking import contour_accuracy, region_similarity
from perception_rt.evaluation.outcomes import Outcomes, TaskResult, mean_of
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.processing.image import decode_image
from perception_rt.processing.label_propagation import PropagationSettings, track_masks
from perception_rt.processing.masks import Mask, overlay, read_mask
from perception_rt.runtime.embedder import Embedder

_VOID = 255  # pixels that belong to no object
_J, _F, _MEAN, _COPIED = "J", "F", "J&F", "J&F of the first mask"
_SETTINGS = ("context_frames", "radius", "top_k", "temperature")


def run(engine: Embedder, data: str, options: TaskOptions, on_progress: OnProgress) -> TaskResult:
    """Runs the task: J, F and their mean over objects, as in DAVIS 2017 with the first mask given.

    An object's J and F are the means over the frames with masks, without the first and the last
    frame. The baseline keeps the first mask in all frames.

    Args:
        engine: a loaded encoder.
        data: as for `read_masked`, with a folder of frames for each video. Masks have numbers of
            objects, 0 for the background. The first frame needs a mask.
        options: the options of `dense_features`, and those of `PropagationSettings`.
        on_progress: called after each frame.

    Raises:
        InputError: the data are unusable.
    """
    chosen = {name: getattr(options, name) for name in _SETTINGS}
    settings = PropagationSettings(**{k: v for k, v in chosen.items() if v is not None})
    frames = read_masked(data)
    videos = [(name, list(own)) for name, own in groupby(frames, key=lambda frame: frame.folder)]
    ids, groups, rows, drawings = [], [], [], []
    expected, answers, pictures = [], [], []
    done = 0
    for name, video in videos:
        first = _first_mask(name, video)
        masks = []
        features = dense_features(engine, [frame.image.source for frame in video], options)
        for mask in track_masks(features, first, settings):
            masks.append(mask)
            on_progress("frames", done + len(masks), len(frames))
        done += len(video)
        scored = _scored(name, video)
        truth = [_objects(video[index]) for index in scored]
        for number in (int(n) for n in np.unique(first) if n):
            ids.append(f"{name}/{number}")
            groups.append(name)
            rows.append(_score(truth, [masks[index] for index in scored], first, number))
            expected.append(f"{_area(truth, number):.1f} pixels")
            answers.append(f"{_area([masks[index] for index in scored], number):.1f} pixels")
            pictures.append(video[0].image)
            drawings.append(_drawings(video, masks, scored))
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    outcomes = Outcomes(
        ids=ids,
        expected=expected,
        answers=answers,
        columns=columns,
        groups=groups,
        pictures=pictures,
        drawings=drawings,
        files=[item for frame in frames for item in _files(frame)],
    )
    return TaskResult(
        parts={"": outcomes},
        metrics=[mean_of(key) for key in (_MEAN, _J, _F, _COPIED)],
        settings=options.given()
        | {"videos": len(videos), **{name: getattr(settings, name) for name in _SETTINGS}},
    )


def _first_mask(name: str, video: Sequence[MaskedImage]) -> Mask:
    if video[0].mask is None:
        raise InputError(f"the first frame of video {name!r:.100} has no mask")
    first = _objects(video[0])
    if not first.any():
        raise InputError(f"mask {video[0].mask.source!r:.200} has no object")
    return first


def _objects(frame: MaskedImage) -> Mask:
    assert frame.mask is not None
    mask = read_mask(frame.mask.file)
    mask[mask == _VOID] = 0
    return mask


def _files(frame: MaskedImage) -> list[Item]:
    return [frame.image] if frame.mask is None else [frame.image, frame.mask]


def _scored(name: str, video: Sequence[MaskedImage]) -> list[int]:
    """Frames that are scored: those with masks, without the first and the last frame."""
    scored = [i for i in range(1, len(video) - 1) if video[i].mask is not None]
    if not scored:
        raise InputError(
            f"video {name!r:.100} has no mask between its first and its last frame to score by"
        )
    return scored


def _score(
    truth: Sequence[Mask], masks: Sequence[Mask], first: Mask, number: int
) -> dict[str, float]:
    """Means over frames of an object: J, F, their mean, and that of the first mask."""
    own = np.mean([_pair(m == number, t == number) for m, t in zip(masks, truth, strict=True)], 0)
    kept = np.mean([_pair(first == number, mask == number) for mask in truth])
    return {_MEAN: float(own.mean()), _J: float(own[0]), _F: float(own[1]), _COPIED: float(kept)}


def _pair(predicted: NDArray[np.bool_], expected: NDArray[np.bool_]) -> tuple[float, float]:
    return region_similarity(predicted, expected), contour_accuracy(predicted, expected)


def _area(masks: Sequence[Mask], number: int) -> float:
    return float(np.mean([np.count_nonzero(mask == number) for mask in masks]))


def _drawings(
    video: Sequence[MaskedImage], masks: Sequence[Mask], scored: Sequence[int]
) -> list[Image.Image]:
    """The predicted masks of the middle and of the last scored frame."""
    shown = [scored[len(scored) // 2], scored[-1]]
    return [overlay(decode_image(video[i].image.source), masks[i]) for i in shown]
