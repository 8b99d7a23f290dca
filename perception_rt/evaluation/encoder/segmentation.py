"""Task: label pixels by a linear probe (a convolution of 1x1) on frozen dense features.

Legend: N images, R patches to learn from, C classes, D width of features, h w grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from perception_rt.errors import InputError
from perception_rt.evaluation.data.class_names import read_classes
from perception_rt.evaluation.data.masked import MaskedImage, read_masked
from perception_rt.evaluation.encoder.dense import dense_features
from perception_rt.evaluation.encoder.linear_probe import PENALTIES, choose_penalty
from perception_rt.evaluation.encoder.logistic import Logistic, fit_logistic
from perception_rt.evaluation.metrics.segmentation import class_overlaps, mean_iou, pixel_accuracy
from perception_rt.evaluation.outcomes import (
    Columns,
    Float32,
    Float64,
    Metric,
    Outcomes,
    TaskResult,
)
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.processing.masks import Mask, mask_image, read_mask
from perception_rt.records import check_integer
from perception_rt.runtime.embedder import Embedder

_MAX_PATCHES = 100_000  # to learn from, of all images together
_FOLDS = 5  # every fifth image chooses the penalty
_SEED = 0
_DRAWING_PX = 150
_BOTH, _EITHER, _PIXELS = "intersection", "union", "pixels"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Probe:
    """A fitted probe: channels are standardised by `mean` and `scale`, (D,) each."""

    mean: Float32
    scale: Float32
    logistic: Logistic

    def predict(self, dense: Float32, size: tuple[int, int]) -> Mask:
        """Class of each pixel of a mask of some height and width, from features (h, w, D)."""
        rows = (dense.reshape(-1, dense.shape[2]) - self.mean) * self.scale
        logits = self.logistic.scores(rows).astype(np.float32).reshape(*dense.shape[:2], -1)
        best: Mask = np.zeros(size, np.uint8)
        most = np.full(size, -np.inf, np.float32)
        for number in range(logits.shape[2]):
            plane = Image.fromarray(np.ascontiguousarray(logits[:, :, number]))
            scores = np.asarray(plane.resize(size[::-1], Image.Resampling.BILINEAR))
            higher = scores > most
            best[higher], most[higher] = number, scores[higher]
        return best


def run(engine: Embedder, data: str, options: TaskOptions, on_progress: OnProgress) -> TaskResult:
    """Runs the task: mIoU, pixel accuracy and the IoU of each class.

    A fifth of the training images chooses the penalty; then all images are fitted. The loss of a
    patch is the mean cross-entropy of its pixels. Logits are interpolated between patches.

    Args:
        engine: a loaded encoder.
        data: as for `read_masked`; masks have class numbers.
        options: `train_data` as `data`; `classes` names the numbers from 0; `ignore_label`; and
            the options of `dense_features`.
        on_progress: called after each image and each fit.

    Raises:
        InputError: the data are unusable.
        BackendError: torch is not installed.
    """
    ignored = 255 if options.ignore_label is None else options.ignore_label
    check_integer("--ignore-label", ignored, 0, 255)
    if options.train_data is None:
        raise InputError("give --train-data: images and masks, as DATA")
    train, test = _complete(options.train_data), _complete(data)
    if len(train) < 2:
        raise InputError("the training data must have at least two images")
    names = None if options.classes is None else read_classes(options.classes)
    classes = _count_classes([*train, *test], names, ignored)
    probe, settings = _fit(engine, train, classes, ignored, options, on_progress)
    outcomes = _outcomes(engine, test, probe, classes, ignored, options, on_progress)
    shown = names or [str(number) for number in range(classes)]
    return TaskResult(
        parts={"": outcomes}, metrics=_metrics(outcomes, shown),
        settings=options.given() | settings | {"classes": classes},
    )  # fmt: skip


def _complete(data: str) -> list[MaskedImage]:
    found = read_masked(data)
    for image in found:
        if image.mask is None:
            raise InputError(f"image {image.image.source!r:.200} has no mask")
    return found


def _read(image: MaskedImage) -> Mask:
    assert image.mask is not None
    return read_mask(image.mask.file)


def _count_classes(images: Sequence[MaskedImage], names: Sequence[str] | None, ignored: int) -> int:
    """Number of classes: of the names, or the highest number of a mask plus 1."""
    highest = -1
    for image in images:
        numbers = np.unique(_read(image))
        highest = max([highest, *(int(n) for n in numbers if n != ignored)])
        if names is not None and highest >= len(names):
            assert image.mask is not None
            raise InputError(
                f"mask {image.mask.source!r:.200} has the class {highest}, and there are "
                f"{len(names)} names, numbered from 0; --ignore-label leaves one number out"
            )
    if highest < 1 and names is None:
        raise InputError("the masks have fewer than two classes")
    return highest + 1 if names is None else len(names)


def _fit(
    engine: Embedder, images: Sequence[MaskedImage], classes: int, ignored: int,
    options: TaskOptions, on_progress: OnProgress,
) -> tuple[_Probe, dict[str, object]]:  # fmt: skip
    generator = np.random.default_rng(_SEED)
    most = max(1, _MAX_PATCHES // len(images))
    features, shares, owners = [], [], []
    paths = [image.image.source for image in images]
    for number, dense in enumerate(dense_features(engine, paths, options)):
        found = _patch_shares(_read(images[number]), dense.shape[:2], classes, ignored)
        usable = generator.permutation(np.flatnonzero(found.any(axis=1)))[:most]
        features.append(dense.reshape(-1, dense.shape[2])[usable])
        shares.append(found[usable])
        owners.append(np.full(len(usable), number))
        on_progress("training images", number + 1, len(images))
    rows, labels = np.concatenate(features), np.concatenate(shares)
    if not len(rows):
        raise InputError("all pixels of the training masks are ignored")
    mean, scale = rows.mean(axis=0), 1 / np.maximum(rows.std(axis=0), np.float32(1e-6))
    rows = (rows - mean) * scale
    held_out = np.flatnonzero(np.concatenate(owners) % _FOLDS == _FOLDS - 1)
    if not 0 < len(held_out) < len(rows):  # fewer images than folds
        held_out = np.flatnonzero(np.concatenate(owners) == 0)
    penalty, accuracies = choose_penalty(rows, labels, classes, held_out, on_progress)
    probe = _Probe(mean=mean, scale=scale, logistic=fit_logistic(rows, labels, classes, penalty))
    validation = [
        {"penalty": value, "pixel accuracy": accuracy}
        for value, accuracy in zip(PENALTIES, accuracies, strict=True)
    ]
    return probe, {
        "train_images": len(images),
        "train_patches": len(rows),
        "penalty": penalty,
        "validation": validation,
    }


def _patch_shares(mask: Mask, grid: tuple[int, ...], classes: int, ignored: int) -> Float64:
    """Share of each class in each patch, (h * w, C); ignored pixels have none."""
    size = grid[1], grid[0]
    planes = [
        Image.fromarray((mask == number).astype(np.float32)).resize(size, Image.Resampling.BOX)
        for number in range(classes)
    ]
    shares = np.stack([np.asarray(plane, np.float64) for plane in planes], axis=-1)
    if ignored < classes:
        shares[:, :, ignored] = 0
    return shares.reshape(-1, classes)


def _outcomes(
    engine: Embedder, images: Sequence[MaskedImage], probe: _Probe, classes: int, ignored: int,
    options: TaskOptions, on_progress: OnProgress,
) -> Outcomes:  # fmt: skip
    both, either, pixels = [], [], []
    expected, answers, drawings = [], [], []
    paths = [image.image.source for image in images]
    for number, dense in enumerate(dense_features(engine, paths, options)):
        mask = _read(images[number])
        predicted = probe.predict(dense, mask.shape)
        overlaps = class_overlaps(predicted, mask, classes, ignored)
        both.append(overlaps[0])
        either.append(overlaps[1])
        pixels.append(float(np.count_nonzero(mask != ignored)))
        expected.append(_areas(mask, ignored))
        answers.append(_areas(predicted[mask != ignored], ignored))
        drawings.append([_drawing(mask), _drawing(predicted)])
        on_progress("images", number + 1, len(images))
    columns = {_BOTH: np.stack(both), _EITHER: np.stack(either), _PIXELS: np.array(pixels)}
    masks = [image.mask for image in images if image.mask is not None]
    return Outcomes(
        ids=[image.name for image in images],
        expected=expected,
        answers=answers,
        columns=columns,
        pictures=[image.image for image in images],
        drawings=drawings,
        files=masks,
    )


def _areas(mask: Mask, ignored: int) -> list[str]:
    """Classes of a mask with their share of the pixels that count."""
    counts = np.bincount(mask[mask != ignored].reshape(-1))
    return [
        f"{number}: {100 * counts[number] / counts.sum():.2f} %"
        for number in np.flatnonzero(counts)
    ]


def _drawing(mask: Mask) -> Image.Image:
    picture = mask_image(mask)
    picture.thumbnail((_DRAWING_PX, _DRAWING_PX), Image.Resampling.NEAREST)
    return picture


def _metrics(outcomes: Outcomes, names: Sequence[str]) -> list[Metric]:
    """mIoU and pixel accuracy, and the IoU of each class that occurs."""
    metrics = [
        Metric(name="mIoU", compute=lambda c: mean_iou(c[_BOTH], c[_EITHER])),
        Metric(name="pixel accuracy", compute=lambda c: pixel_accuracy(c[_BOTH], c[_PIXELS])),
    ]
    present = outcomes.columns[_EITHER].sum(axis=0) > 0
    for number, name in enumerate(names):
        if present[number]:

            def iou(columns: Columns, number: int = number) -> float:
                own = slice(number, number + 1)
                return mean_iou(columns[_BOTH][:, own], columns[_EITHER][:, own])

            metrics.append(Metric(name=f"IoU of {name}", compute=iou))
    return metrics
