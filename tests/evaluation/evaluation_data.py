"""Small data sets on disk: pictures of one colour, with classes or captions."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

COLOURS = ("blue", "green", "red")


def picture(name: str, shade: int = 0) -> bytes:
    """A PNG of one colour; another shade gives other bytes."""
    rgb = {"red": (200 + shade, 20, 20), "green": (20, 200 + shade, 20), "blue": (20, 20, 200)}
    red, green, blue = rgb[name]
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (red, green, blue + (shade if name == "blue" else 0))).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def write_folders(root: Path, count: int = 4, first: int = 0) -> Path:
    """A folder of pictures for each colour."""
    for name in COLOURS:
        (root / name).mkdir(parents=True)
        for shade in range(first, first + count):
            (root / name / f"{shade}.png").write_bytes(picture(name, shade))
    return root


def write_table(root: Path, rows: list[str], name: str = "data.csv") -> Path:
    """A table of lines, its columns first."""
    file = root / name
    file.write_text("\n".join(rows) + "\n", "utf-8")
    return file


def write_tars(root: Path, members: dict[str, bytes], split: str = "test") -> Path:
    """A folder in CLIP_benchmark's layout, with one tar."""
    (root / split).mkdir(parents=True)
    (root / split / "nshards.txt").write_text("1\n")
    with tarfile.open(root / split / "0.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return root


def classified_tars(root: Path) -> Path:
    """Two pictures per colour, with class numbers, class names and templates."""
    members = {}
    for number, name in enumerate(COLOURS):
        for shade in range(2):
            key = f"s{number}{shade}"
            members |= {f"{key}.png": picture(name, shade), f"{key}.cls": b"%d" % number}
    write_tars(root, members)
    (root / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c}\n")
    return root


def write_captions(root: Path) -> Path:
    """A picture per colour with two captions each, as lines of JSON."""
    lines = []
    for name in COLOURS:
        (root / f"{name}.png").write_bytes(picture(name))
        lines.append({"image": f"{name}.png", "captions": [f"a {name} square", f"all {name}"]})
    file = root / "captions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
