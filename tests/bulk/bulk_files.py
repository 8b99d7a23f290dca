"""Makes files to embed."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int) -> bytes:
    """A JPEG of 30 coloured squares, 48 x 40 pixels."""
    squares = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(squares).resize((48, 40), Image.Resampling.NEAREST).save(buffer, "JPEG")
    return buffer.getvalue()


def write_photos(folder: Path, count: int, broken: frozenset[int] = frozenset()) -> None:
    """Writes `00000.jpg` and so on; broken ones are cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        data = jpeg(index)
        (folder / f"{index:05}.jpg").write_bytes(data[: 200 if index in broken else None])


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
