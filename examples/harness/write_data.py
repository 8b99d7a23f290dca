"""Writes held-out data of the demos: `python examples/harness/write_data.py [FOLDER]`.

`digits` and `captions` are in CLIP_benchmark's layout: digits with their class, and coloured digits
with up to three captions each. `scenes` has questions about rows of digits, as lines of JSON with
PNG and MP4 files beside them. The digits are by writers that the demos were not trained on.
"""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from training.demo.digits import held_out, plain_image
from training.demo.questions import LEARNED, Record, held_out_record
from training.demo.scenes import COLORS, WORDS, caption, draw_scene

FOLDER = Path("out/harness")
SIZE = 96  # pixels of a side; the models resize to 64
TEMPLATES = ("a photo of the handwritten digit {c}", "a handwritten {c}", "{c}")
CAPTIONS = 3  # most per picture
QUESTIONS = 100  # of each set
VIDEOS = 20
FRAMES = 3  # per video
SEED = 16


def write_digits(folder: Path) -> None:
    """Writes the 450 held-out digits as pictures with a class."""
    digits = held_out()
    members = [
        (png(plain_image(ink, SIZE)), "cls", str(label))
        for ink, label in zip(digits.ink, digits.labels, strict=True)
    ]
    write_tar(folder / "test", members)
    write_lines(folder / "classnames.txt", WORDS)
    write_lines(folder / "zeroshot_classification_templates.txt", TEMPLATES)


def write_captions(folder: Path) -> None:
    """Writes coloured scenes of held-out digits with captions.

    No caption occurs twice, because harnesses rank equal captions differently.
    """
    digits = held_out()
    members, seen = [], set[str]()
    for number, (ink, label) in enumerate(zip(digits.ink, digits.labels, strict=True)):
        rng = np.random.default_rng((SEED, number))
        image, scene = draw_scene(rng, ink, int(label), SIZE)
        texts = sorted({caption(rng, scene) for _ in range(CAPTIONS)} - seen)
        seen.update(texts)
        if texts:
            members.append((png(image), "txt", "\n".join(texts)))
    write_tar(folder / "test", members)
    write_lines(folder / "dataset_type.txt", ["retrieval"])


def write_scenes(folder: Path) -> None:
    """Writes questions by their form of answer: texts, boxes, choices; and some about videos."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[Any]] = {"questions": [], "boxes": [], "choices": [], "videos": []}
    for name in ("read3", *LEARNED):
        for number in range(QUESTIONS):
            found = held_out_record(name, number)
            images = found["image"] if isinstance(found["image"], list) else [found["image"]]
            files = [f"{name}_{number:03}_{index}.png" for index in range(len(images))]
            for file, image in zip(files, images, strict=True):
                (folder / file).write_bytes(png(image))
            asked = {"kind": name, "conversations": found["conversations"]}
            about = {**asked, "image": files}
            lines["boxes" if name == "locate" else "questions"].append(about)
            if name == "colour":
                lines["choices"].append({**about, "choices": choices(found, number)})
            if name == "read3" and number < VIDEOS:
                video = f"{name}_{number:03}.mp4"
                write_video(folder / video, images[0])
                lines["videos"].append({**asked, "video": video})
    for name, records in lines.items():
        write_lines(folder / f"{name}.jsonl", map(json.dumps, records))


def choices(found: Record, number: int) -> list[str]:
    """The colour that answers a question, among three others."""
    rng = np.random.default_rng((SEED, number))
    right = found["conversations"][1]["value"]
    others = rng.permutation([color for color in COLORS if color != right])[:3]
    return sorted([right, *map(str, others)])


def png(image: Any) -> bytes:
    """A PNG file of uint8 (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_video(path: Path, image: Any) -> None:
    """Writes a video that shows one picture, uint8 (H, W, 3), for some frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "yuv420p"
        for _ in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_tar(folder: Path, members: list[tuple[bytes, str, str]]) -> None:
    """Writes one tar of pictures, each with a text whose ending is given, and `nshards.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in _named(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    write_lines(folder / "nshards.txt", ["1"])


def write_lines(path: Path, lines: Any) -> None:
    """Writes texts as lines of a file."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _named(members: list[tuple[bytes, str, str]]) -> Iterator[tuple[str, bytes]]:
    for number, (picture, ending, text) in enumerate(members):
        yield f"{number:04}.png", picture
        yield f"{number:04}.{ending}", text.encode()


def main(arguments: list[str]) -> None:
    """Writes all data."""
    folder = Path(arguments[0]) if arguments else FOLDER
    write_digits(folder / "digits")
    write_captions(folder / "captions")
    write_scenes(folder / "scenes")
    print(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
