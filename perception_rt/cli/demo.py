"""Runs the command `demo`: the shipped models classify, answer and draw held-out pictures."""

import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perception_rt.demo import DEMO_PE, DEMO_PLM, pictures_path
from perception_rt.errors import InputError, PackageError

if TYPE_CHECKING:
    from perception_rt.runtime.embedder import Embedder
    from perception_rt.runtime.generator import Generator

_LIST = "pictures.json"
_TEMPLATES = ("a photo of the handwritten digit {}", "a handwritten {}")
_MAX_NEW_TOKENS = 32
_SAME_BOX = 0.5  # least intersection over union of an answer's box and the right one
_LEAST_RIGHT = 0.8  # of all pictures and questions; the models get this many right elsewhere
_SIDE_PX = 448
_COLUMNS = 5
_FEATURES, _BOXES = "features.png", "boxes.png"


def run_demo(options: Namespace) -> int:
    """Classifies, answers and draws; returns 1 if too few results are right.

    Raises:
        InputError: the folder for the pictures cannot be made or written.
        PackageError: the demo is not installed whole, or cannot be copied to the cache.
    """
    pictures, out = _read_list(), Path(options.out)
    _copy_pictures(pictures, out)
    shown = _Demo(pictures, out, quiet=options.json)
    results = {"digits": shown.classify(), "questions": shown.ask()}
    marks = [item["right"] for items in results.values() for item in items]
    if options.json:
        drawn = [str(out / name) for name in (_FEATURES, _BOXES)]
        print(json.dumps({**results, "pictures": drawn}, indent=2))
    else:
        print(f"\n{sum(marks)} of {len(marks)} right. Drawn: {out / _FEATURES}, {out / _BOXES}")
        print("\nNext:")
        for line in _next(out, pictures):
            print(f"  {line}")
    if sum(marks) < _LEAST_RIGHT * len(marks):
        print("the engines do not compute here as they do elsewhere", file=sys.stderr)
        return 1
    return 0


def _read_list() -> dict[str, list[dict[str, Any]]]:
    try:
        data = (pictures_path() / _LIST).read_bytes()
        found: dict[str, list[dict[str, Any]]] = json.loads(data)
    except (OSError, ValueError):
        raise PackageError(
            f"the installed {_LIST} cannot be read: reinstall perception_rt"
        ) from None
    return found


def _copy_pictures(pictures: dict[str, list[dict[str, Any]]], out: Path) -> None:
    names = [item["image"] for item in pictures["digits"]]
    names += [name for item in pictures["questions"] for name in item["images"]]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in names:
            (out / name).write_bytes((pictures_path() / name).read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot write the pictures to {str(out)!a:.160}: {error.strerror}; "
            "--out names another folder"
        ) from None


def _next(out: Path, pictures: dict[str, list[dict[str, Any]]]) -> list[str]:
    digit, row = pictures["digits"][3]["image"], pictures["questions"][0]["images"][0]
    digit, row = (shlex.quote(str(out / name)) for name in (digit, row))
    return [
        f"perception-rt classify {DEMO_PE} --image {digit} --label two three eight",
        f"perception-rt chat {DEMO_PLM} --image {row}",
        'pip install "perception_rt[export]" && perception-export --list',
    ]


class _Demo:
    """The pictures of the demo, and the folder of its results."""

    def __init__(
        self, pictures: dict[str, list[dict[str, Any]]], out: Path, *, quiet: bool
    ) -> None:
        self._pictures = pictures
        self._out = out
        self._quiet = quiet

    def classify(self) -> list[dict[str, Any]]:
        """Classifies each digit, and draws the features of all."""
        from perception_rt.runtime.embedder import Embedder

        items = self._pictures["digits"]
        images = [str(self._out / item["image"]) for item in items]
        labels = [item["label"] for item in items]
        with Embedder.load(DEMO_PE) as pe:
            odds = pe.classify(images, labels, _TEMPLATES)
            self._say(f"{DEMO_PE}, a small Perception Encoder, classifies digits in scenes:")
            results = []
            for image, item, row in zip(images, items, odds, strict=True):
                best = labels[int(row.argmax())]
                results.append(
                    {
                        "image": image,
                        "label": best,
                        "probability": float(row.max()),
                        "expected": item["label"],
                        "right": best == item["label"],
                    }
                )
                self._say(f"  {image}: {best} {row.max():.1%}{_remark(results[-1])}")
            self._draw_features(pe, images)
        return results

    def ask(self) -> list[dict[str, Any]]:
        """Asks each question, and draws the boxes of an answer."""
        from perception_rt.processing.boxes import parse_boxes
        from perception_rt.runtime.generator import Generator

        results = []
        with Generator.load(DEMO_PLM) as plm:
            self._say(f"\n{DEMO_PLM}, a small Perception Language Model, answers questions:")
            for item in self._pictures["questions"]:
                images = [str(self._out / name) for name in item["images"]]
                answer = self._answer(plm, images, item["question"])
                results.append(
                    {
                        "images": images,
                        "question": item["question"],
                        "answer": answer,
                        "expected": item["answer"],
                        "right": _is_right(answer, item["answer"]),
                    }
                )
                self._say(_remark(results[-1]))
                if parse_boxes(answer):
                    self._draw_boxes(images[0], answer)
        return results

    def _answer(self, plm: "Generator", images: list[str], question: str) -> str:
        self._say(f"  {' '.join(images)}: {question} ", end="")
        pieces = []
        for piece in plm.stream(question, images=images, max_new_tokens=_MAX_NEW_TOKENS):
            pieces.append(piece)
            self._say(piece, end="")
        return "".join(pieces)

    def _draw_features(self, pe: "Embedder", images: list[str]) -> None:
        """Draws the digits in rows, and beside them the features of their patches as colours."""
        import numpy as np
        from PIL import Image

        from perception_rt.processing.image import decode_image
        from perception_rt.processing.pca import side_by_side

        def sheet(parts: list[Any]) -> Any:
            rows = [parts[i : i + _COLUMNS] for i in range(0, len(parts), _COLUMNS)]
            return np.concatenate([np.concatenate(row, axis=1) for row in rows])

        shown = sheet([np.asarray(decode_image(image)) for image in images])
        dense = sheet(list(pe.features(images)))
        side_by_side(Image.fromarray(shown), dense).save(self._out / _FEATURES)

    def _draw_boxes(self, image: str, answer: str) -> None:
        from PIL import Image

        from perception_rt.processing.boxes import draw_box, parse_boxes
        from perception_rt.processing.image import decode_image

        size = (_SIDE_PX, _SIDE_PX)
        picture = decode_image(image).resize(size, Image.Resampling.NEAREST)
        for box in parse_boxes(answer):
            picture = Image.fromarray(draw_box(picture, box.to_pixels(*size)))
        picture.save(self._out / _BOXES)

    def _say(self, text: str, *, end: str = "\n") -> None:
        if not self._quiet:
            print(text, end=end, flush=True)


def _remark(result: dict[str, Any]) -> str:
    return "" if result["right"] else f"   (it is {result['expected']})"


def _is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected text, or a box that covers much of the expected one."""
    from perception_rt.processing.boxes import overlap, parse_boxes

    boxes, wanted = parse_boxes(answer), parse_boxes(expected)
    if wanted:
        return len(boxes) == 1 and overlap(boxes[0], wanted[0]) >= _SAME_BOX
    return answer.strip() == expected
