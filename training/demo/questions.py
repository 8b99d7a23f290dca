"""Questions about rows of handwritten digits, in the reference's jsonl schema.

(set, seed, number) fix a record. A record is what a line of a jsonl file would hold, with image
arrays in place of paths: one or two images, and one or several questions about them. The demo model
is trained on the sets in `LEARNED`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from perception_rt.errors import InputError
from perception_rt.processing.boxes import format_box, overlap, parse_boxes
from training.data.records import Pixels
from training.demo.digits import Digits, Placement, held_out, ink_mask, training_digits
from training.demo.scenes import COLORS

IMAGE_SIZE = 64
MOST_DIGITS = 6
_COUNTS = (0.22, 0.22, 0.26, 0.14, 0.09, 0.07)  # probability that a row has 1 to 6 digits
VALIDATION = 200  # digits at the end of the training split

_INKS = ("black", "white", "red", "green", "blue", "yellow", "orange", "purple")
_MIN_CONTRAST = 150.0  # smallest RGB distance between ink and background
_JITTER = 12.0
_NOISE = 8.0
_HELD_OUT_SEED = 20_000_004
MAX_QUESTIONS = {"locate": 2, "colour": 4, "exists": 5}  # per image
_MIN_OVERLAP = 0.5  # intersection over union of two boxes that count as equal

Record = dict[str, Any]
Bounds = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An image of digits side by side.

    Attributes:
        image: uint8 (64, 64, 3).
        digits: digits from left to right.
        inks: colour of each digit.
        boxes: box around the ink of each digit, x1, y1, x2, y2 in pixels.
        ground: colour of the background.
    """

    image: Pixels
    digits: tuple[int, ...]
    inks: tuple[str, ...]
    boxes: tuple[Bounds, ...]
    ground: str

    @property
    def number(self) -> str:
        """The digits as text."""
        return "".join(map(str, self.digits))


def record(name: str, seed: int, number: int, *, validation: bool = False) -> Record:
    """Draws one conversation.

    Args:
        name: name of the set, a key of `SETS`.
        seed: RNG seed.
        number: number of the sample.
        validation: use the validation digits, which are not trained on.

    Raises:
        InputError: the set is unknown.
    """
    draw = _set(name)
    rng = np.random.default_rng((seed, number, list(SETS).index(name), validation))
    return draw(rng, _split(validation))


def held_out_record(name: str, number: int) -> Record:
    """Draws a question about held-out digits, for the final evaluation.

    Args:
        name: name of the set; `read3` is `read` with rows of three digits.
        number: number of the sample.

    Raises:
        InputError: the set is unknown.
    """
    rng = np.random.default_rng((_HELD_OUT_SEED, number))
    if name == "read3":
        row = draw_row(rng, held_out(), 3)
        return _conversation([row.image], (_READ[0], row.number))
    found = _set(name)(rng, held_out())
    if "conversations" in found:
        found["conversations"] = found["conversations"][:2]
    return found


def is_right(name: str, answer: str, found: Record) -> bool:
    """Whether an answer is right: equal text, or for `locate` an intersection over union of 0.5."""
    wanted = found["conversations"][1]["value"]
    if name != "locate":
        return bool(answer.strip() == wanted)
    boxes = parse_boxes(answer)
    return len(boxes) == 1 and overlap(boxes[0], parse_boxes(wanted)[0]) >= _MIN_OVERLAP


def draw_row(
    rng: np.random.Generator, digits: Digits, count: int | None = None, *, wanted: str | None = None
) -> Row:
    """Draws a row of random digits.

    Args:
        rng: random generator.
        digits: digits to choose from.
        count: number of digits; None draws 1 to 6, with long rows rare.
        wanted: the exact digits to show, instead of random ones.
    """
    if wanted is not None:
        count = len(wanted)
    elif count is None:
        count = 1 + int(rng.choice(MOST_DIGITS, p=_COUNTS))
    ground = _INKS[rng.integers(len(_INKS))]
    fitting = [ink for ink in _INKS if _distance(ink, ground) >= _MIN_CONTRAST]
    one = fitting[rng.integers(len(fitting))]
    mixed = rng.random() < 0.5
    picture = np.broadcast_to(_shade(rng, ground), (IMAGE_SIZE, IMAGE_SIZE, 3))
    picture = picture + rng.uniform(-_NOISE, _NOISE, (IMAGE_SIZE, IMAGE_SIZE, 1))
    cell = 1.0 / max(count, 2)
    left = rng.uniform(0, 1 - cell * count)
    height = rng.uniform(0.3, 0.7)
    found, inks, boxes = [], [], []
    for index in range(count):
        rows = np.arange(len(digits))
        if wanted is not None:
            rows = np.flatnonzero(digits.labels == int(wanted[index]))
        row = int(rows[rng.integers(len(rows))])
        ink = fitting[rng.integers(len(fitting))] if mixed else one
        size = min(cell, 0.4) * rng.uniform(1.0, 1.15)
        place = Placement(
            size=size,
            x=left + cell * (index + 0.5),
            y=height + rng.uniform(-0.04, 0.04),
            angle=rng.uniform(-0.1, 0.1),
            shear=rng.uniform(-0.1, 0.1),
            stretch=rng.uniform(0.85, 1.0),
        )
        mask = ink_mask(digits.ink[row], IMAGE_SIZE, place)
        picture = picture + (_shade(rng, ink) - picture) * mask[:, :, None]
        found.append(int(digits.labels[row]))
        inks.append(ink)
        boxes.append(_bounds(mask))
    return Row(
        image=np.clip(picture + 0.5, 0, 255).astype(np.uint8),
        digits=tuple(found),
        inks=tuple(inks),
        boxes=tuple(boxes),
        ground=ground,
    )


def _conversation(images: list[Pixels], *exchanges: tuple[str, str]) -> Record:
    """A record of questions and answers."""
    turns = []
    for question, answer in exchanges:
        turns.append({"from": "human", "value": question})
        turns.append({"from": "assistant", "value": answer})
    return {"image": images if len(images) > 1 else images[0], "conversations": turns}


def _caption(rng: np.random.Generator, digits: Digits) -> Record:
    row = draw_row(rng, digits)
    inks = " ".join(row.inks)
    text = f"{row.number} in {inks} on {row.ground}"
    return {"image": row.image, "text": text}


def _describe(rng: np.random.Generator, digits: Digits) -> Record:
    """Lists digits, colours and boxes of a row; stage 2 trains on it."""
    row = draw_row(rng, digits)
    parts = [
        f"{digit} {ink} {format_box(box, IMAGE_SIZE, IMAGE_SIZE)}"
        for digit, ink, box in zip(row.digits, row.inks, row.boxes, strict=True)
    ]
    return _conversation([row.image], ("Describe the image.", "; ".join(parts)))


_READ = ("What number is written here?", "Read the digits.", "Which digits do you see?")


def _read(rng: np.random.Generator, digits: Digits) -> Record:
    row = draw_row(rng, digits)
    return _conversation([row.image], (_READ[rng.integers(len(_READ))], row.number))


def _count(rng: np.random.Generator, digits: Digits) -> Record:
    row = draw_row(rng, digits)
    return _conversation([row.image], ("How many digits are there?", str(len(row.digits))))


def _with_unique(rng: np.random.Generator, digits: Digits) -> tuple[Row, list[int]]:
    """A row, and in random order the places of digits that occur in it once."""
    while True:
        row = draw_row(rng, digits)
        places = [i for i, digit in enumerate(row.digits) if row.digits.count(digit) == 1]
        if places:
            return row, list(rng.permutation(places))


def _locate(rng: np.random.Generator, digits: Digits) -> Record:
    row, places = _with_unique(rng, digits)
    exchanges = [
        (f"Where is the {row.digits[i]}?", format_box(row.boxes[i], IMAGE_SIZE, IMAGE_SIZE))
        for i in places[: MAX_QUESTIONS["locate"]]
    ]
    return _conversation([row.image], *exchanges)


def _colour(rng: np.random.Generator, digits: Digits) -> Record:
    row, places = _with_unique(rng, digits)
    exchanges = [
        (f"What colour is the {row.digits[i]}?", row.inks[i])
        for i in places[: MAX_QUESTIONS["colour"]]
    ]
    return _conversation([row.image], *exchanges)


def _exists(rng: np.random.Generator, digits: Digits) -> Record:
    row = draw_row(rng, digits)
    pools = {"yes": sorted(set(row.digits)), "no": [d for d in range(10) if d not in row.digits]}
    exchanges: list[tuple[str, str]] = []
    while len(exchanges) < MAX_QUESTIONS["exists"]:
        answer = "yes" if rng.random() < 0.5 else "no"
        if not pools[answer]:  # stop, since the answer to a remaining digit could be guessed
            break
        digit = pools[answer].pop(rng.integers(len(pools[answer])))
        exchanges.append((f"Is there a {digit}?", answer))
    return _conversation([row.image], *exchanges)


def _compare(rng: np.random.Generator, digits: Digits) -> Record:
    first = draw_row(rng, digits, int(rng.integers(1, 4)))
    same = rng.random() < 0.5
    wanted = first.number
    while not same and wanted == first.number:
        wanted = "".join(str(rng.integers(10)) for _ in first.digits)
        # Half of the different numbers differ in one digit.
        if rng.random() < 0.5:
            place = int(rng.integers(len(wanted)))
            wanted = first.number[:place] + wanted[place] + first.number[place + 1 :]
    second = draw_row(rng, digits, wanted=wanted)
    question = "Do both images show the same number?"
    return _conversation([first.image, second.image], (question, "yes" if same else "no"))


def _last(rng: np.random.Generator, digits: Digits) -> Record:
    """A question that the demo is not trained on, for fine-tuning."""
    row = draw_row(rng, digits)
    return _conversation([row.image], ("Which digit is the rightmost?", str(row.digits[-1])))


SETS: dict[str, Callable[[np.random.Generator, Digits], Record]] = {
    "captions": _caption,
    "describe": _describe,
    "read": _read,
    "count": _count,
    "locate": _locate,
    "colour": _colour,
    "exists": _exists,
    "compare": _compare,
    "last": _last,
}
LEARNED = ("read", "count", "locate", "colour", "exists", "compare")


def _set(name: str) -> Callable[[np.random.Generator, Digits], Record]:
    """The function that draws a record of a set; InputError if the set is unknown."""
    if name not in SETS:
        raise InputError(f"unknown scenes {name!r:.60}; known are {', '.join(SETS)}")
    return SETS[name]


@cache
def _split(validation: bool) -> Digits:
    digits = training_digits()
    edge = len(digits) - VALIDATION
    return digits.part(slice(edge, len(digits)) if validation else slice(0, edge))


def _distance(first: str, second: str) -> float:
    return float(np.linalg.norm(np.subtract(COLORS[first], COLORS[second])))


def _shade(rng: np.random.Generator, name: str) -> Any:
    return np.array(COLORS[name], np.float32) + rng.uniform(-_JITTER, _JITTER, 3)


def _bounds(mask: Any) -> Bounds:
    """Box around the ink: x1, y1, x2, y2 in pixels."""
    columns = np.flatnonzero(mask.max(axis=0) > 0.5)
    rows = np.flatnonzero(mask.max(axis=1) > 0.5)
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
