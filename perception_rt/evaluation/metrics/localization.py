"""Metrics of boxes in images and of moments in videos, read from the text of an answer."""

import re

from perception_rt.processing.boxes import overlap, parse_boxes

Segment = tuple[float, float]

THRESHOLDS = (0.3, 0.5, 0.7, 0.9)  # of the IoU, for the recall of moments
_ROUNDING = 1e-9  # of an IoU: 3 of 10 is not above 0.3
_SEGMENT = re.compile(r"\[(\d+(?:\.\d+)?),\s*(\d+(?:\.\d+)?)\]", re.ASCII)


def box_iou(answer: str, expected: str) -> float:
    """Intersection over union of the box in an answer and the one in the right answer.

    It is 0 unless the answer has exactly one box: several would be guesses.
    """
    boxes = parse_boxes(answer)
    return overlap(boxes[0], parse_boxes(expected)[0]) if len(boxes) == 1 else 0.0


def parse_segment(text: str) -> Segment | None:
    """The first "[start, end]" in a text, such as "[3, 12.5]"; None without one.

    A segment has two numbers, in the unit that the question asks for. Those in the wrong order are
    swapped, as in PLM-VideoBench.
    """
    found = _SEGMENT.search(text)
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    return min(first, second), max(first, second)


def segment_iou(first: Segment, second: Segment) -> float:
    """Intersection over union of two segments, 0 to 1; 0 if both have no length."""
    both = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    union = (first[1] - first[0]) + (second[1] - second[0]) - both
    return both / union if union else 0.0


def segment_recalls(iou: float) -> dict[str, float]:
    """1 or 0 by threshold: whether an IoU is above it, as PLM-VideoBench counts."""
    return {f"recall@{threshold}": float(iou - threshold > _ROUNDING) for threshold in THRESHOLDS}
