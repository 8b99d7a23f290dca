"""Exports PE-Demo as a detection backbone and draws the levels of its feature pyramid.

    python examples/detection.py

The photograph is one of scikit-learn's. PE-Demo is no detector: its tower is trained, its pyramid
is random. With a detector's weights, pass its package and a picture:

    perception-export --checkpoint mask_rcnn.pth --config encoder.json --detection --out detector
    python examples/detection.py detector picture.jpg

The result is out/detection/levels.png: each level's channels, as colours by PCA.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

import perception_rt
from perception_rt.processing.image import load_image
from perception_rt.processing.pca import principal_colors

OUT = Path("out/detection")
PHOTO = "china.jpg"
SIDE = 512  # pixels of the exported demo; detectors take 1024
TILE = 320  # pixels of a level in the picture
CAPTION = 20  # pixels


def main() -> None:
    """Exports the demo unless there is a package, and draws the levels."""
    OUT.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) not in (1, 3):
        sys.exit("usage: detection.py [PACKAGE PICTURE]")
    package = Path(sys.argv[1]) if sys.argv[1:] else export_demo()
    photo = Path(sys.argv[2]) if sys.argv[2:] else np.asarray(load_sample_image(PHOTO))
    with perception_rt.Embedder.load(package) as backbone:
        levels = backbone.pyramid([photo])
        spec = backbone.image_spec
    for name, level in levels.items():
        _, channels, rows, columns = level.shape
        print(f"{name}: {rows} x {columns} cells of {channels} channels")
    tiles = [tile("image", Image.fromarray(load_image(photo, spec)))]
    for name, level in levels.items():
        cells = np.moveaxis(level, 1, -1)  # (1, K, h, w) -> (1, h, w, K)
        tiles.append(tile(name, Image.fromarray(principal_colors(cells)[0])))
    sheet = Image.new("RGB", (3 * TILE, 2 * (TILE + CAPTION)), "white")
    for index, picture in enumerate(tiles):
        sheet.paste(picture, (index % 3 * TILE, index // 3 * (TILE + CAPTION)))
    sheet.save(OUT / "levels.png")
    print(f"the picture is {OUT / 'levels.png'}")


def export_demo() -> Path:
    """Runs `perception-export`, which prints its own errors; exits if it fails."""
    package = OUT / "package"
    arguments = ["--model", "PE-Demo", "--detection", "--window", "16", "--global-blocks", "1,3"]
    arguments += ["--image-size", str(SIDE), "--out", str(package), "--force"]
    print("$ perception-export", *arguments, flush=True)
    command = Path(sys.executable).with_name("perception-export")
    result = subprocess.run([command, *arguments], check=False)  # noqa: S603
    if result.returncode:
        sys.exit(result.returncode)
    return package


def tile(caption: str, picture: Image.Image) -> Image.Image:
    """A picture, scaled to fit without smoothing, under its caption."""
    scale = TILE / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    result = Image.new("RGB", (TILE, TILE + CAPTION), "white")
    ImageDraw.Draw(result).text((4, 4), caption, fill="black")
    result.paste(picture.resize(size, Image.Resampling.NEAREST), (0, CAPTION))
    return result


if __name__ == "__main__":
    main()
