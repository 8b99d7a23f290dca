"""Chooses the pictures of a report, and the items that they show."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from perception_rt.bulk.contents import Contents
from perception_rt.bulk.listing import Item
from perception_rt.errors import PerceptionError
from perception_rt.evaluation.metrics.classification import confusion_matrix
from perception_rt.evaluation.outcomes import Metric, Outcomes
from perception_rt.evaluation.report.contents import PartReport, Report
from perception_rt.evaluation.report.drawing import (
    RIGHT,
    WRONG,
    Cell,
    confusion_picture,
    histogram_picture,
    sheet_picture,
)
from perception_rt.evaluation.report.figures import Comparison, item_value
from perception_rt.processing.image import decode_image
from perception_rt.processing.image_options import FORMATS_ON_REQUEST, image_options
from perception_rt.processing.video import decode_frames

SHEET_ITEMS = 24
_RIGHT_FROM = 0.5  # value of an item from which it counts as right


def draw_pictures(report: Report, part: PartReport) -> Iterator[tuple[str, bytes]]:
    """Yields the kind and the PNG bytes of each picture of a part.

    A task with classes has a confusion matrix. Items with pictures have a sheet, the worst first.
    With another package, there is a histogram of cosines and a sheet of the items that changed.
    """
    package, result = report.run.package, report.run.result
    about = f"{report.task} {part.name}".strip() + f", {package['model']} {package['precision']}"
    if result.classes:
        yield "confusion", _png(_confusion(part.outcomes, list(result.classes), about))
    if part.outcomes.pictures:
        yield "sheet", _png(_sheet(part.outcomes, result.metrics[0], about))
    comparison = part.comparison
    if comparison is None:
        return
    assert report.against is not None
    against = report.against.package
    about = f"{about} against {against['model']} {against['precision']}"
    if comparison.cosines is not None:
        title = f"{about}: {len(comparison.cosines)} items"
        axis = "cosine of the two embeddings of an item"
        yield "cosines", _png(histogram_picture(comparison.cosines, title, axis))
    if part.outcomes.pictures and comparison.changed:
        yield "changes", _png(_changes(part, comparison, about))


def _confusion(outcomes: Outcomes, classes: list[str], about: str) -> Image.Image:
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name] for name in outcomes.expected])
    answers = np.array([numbers[name] for name in outcomes.answers])
    return confusion_picture(confusion_matrix(labels, answers, len(classes)), classes, about)


def _sheet(outcomes: Outcomes, metric: Metric, about: str) -> Image.Image:
    """The worst items, then others."""
    values = [item_value(outcomes, metric, index) for index in range(len(outcomes))]
    shown = sorted(range(len(outcomes)), key=values.__getitem__)[:SHEET_ITEMS]
    wrong = sum(value < _RIGHT_FROM for value in values)
    cells = []
    for index in shown:
        lines = [outcomes.ids[index]]
        if outcomes.texts:
            lines.append(outcomes.texts[index])
        lines += [
            f"expected: {_text(outcomes.expected[index])}",
            f"answered: {_text(outcomes.answers[index])}",
        ]
        color = RIGHT if values[index] >= _RIGHT_FROM else WRONG
        cells.append(Cell(images=_images(outcomes, index), lines=lines, color=color))
    title = f"{about}: {wrong} of {len(outcomes)} wrong ({metric.name}), worst first"
    return sheet_picture(cells, title)


def _changes(part: PartReport, comparison: Comparison, about: str) -> Image.Image:
    own, other = part.outcomes, part.other
    assert other is not None
    cells = []
    for index in comparison.most_changed()[:SHEET_ITEMS]:
        lines = [
            own.ids[index],
            f"expected: {_text(own.expected[index])}",
            f"answered: {_text(own.answers[index])}",
            f"the other: {_text(other.answers[index])}",
        ]
        if comparison.cosines is not None:
            lines.append(f"cosine: {comparison.cosines[index]:.6f}")
        cells.append(Cell(images=_images(own, index), lines=lines))
    title = f"{about}: {len(comparison.changed)} of {len(own)} answers changed"
    return sheet_picture(cells, title)


def _images(outcomes: Outcomes, index: int) -> list[Image.Image]:
    """The item's picture, the one that was found, and drawings of the answer."""
    items = [outcomes.pictures[index]]
    if outcomes.found:
        items.append(outcomes.found[index])
    drawings = outcomes.drawings[index] if outcomes.drawings else ()
    return [*map(_open, items), *drawings]


def _open(item: Item) -> Image.Image:
    """An image, or the first frame of a video; grey if it cannot be read any more."""
    try:
        with Contents() as contents:
            if item.kind == "video":
                return Image.fromarray(decode_frames(contents.video(item), num_frames=1)[0])
            options = image_options(FORMATS_ON_REQUEST)
            return decode_image(contents.image(item), options=options)
    except PerceptionError:
        return Image.new("RGB", (1, 1), "grey")


def _text(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
