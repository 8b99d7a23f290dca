"""Writes scenes and videos of scikit-learn's digits with masks, for docs/evaluation.md.

`DIR/scenes/train` and `DIR/scenes/test` have a folder `images` and a folder `masks`: a coloured
digit on a coloured background, and a class per pixel, 0 for the background and 1 + the digit. The
test digits are by other writers. `DIR/videos` has frames and masks of two digits that move and
turn, and `DIR/video.mkv` is the first of these videos.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from training.demo.digits import Digits, Placement, held_out, ink_mask, training_digits
from training.demo.scenes import COLORS, draw_background, draw_masked_scene, shade

CLASSES = ("background", *map(str, range(10)))
SCENE_PX = 64
SCENES = (300, 150)  # to train, and to test
VIDEO_PX = 256
FRAMES = 24
# Colours of the background and of the two digits, and the kind of background.
VIDEOS = (
    ("green", "white", "purple", "checked"),
    ("blue", "yellow", "pink", "striped"),
    ("gray", "red", "cyan", "noisy"),
)
_INK = 0.5  # coverage from which a pixel belongs to the digit


def write_scenes(digits: Digits, folder: Path, *, seed: int) -> None:
    """Writes a scene and its mask for each digit."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, (ink, label) in enumerate(zip(digits.ink, digits.labels, strict=True)):
        rng = np.random.default_rng((seed, number))
        image, coverage, _ = draw_masked_scene(rng, ink, int(label), SCENE_PX)
        mask = np.where(coverage > _INK, label + 1, 0).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number:04}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:04}.png")


def draw_video(digits: Digits, video: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draws frames uint8 (H, W, 3) and masks uint8 (H, W) with the numbers 1 and 2.

    The first digit moves from left to right, the second, below it, from right to left.
    """
    rng = np.random.default_rng(video)
    ground, *inks, kind = VIDEOS[video]
    assert all(name in COLORS for name in (ground, *inks))
    still = draw_background(rng, kind, shade(rng, ground), VIDEO_PX)
    colors = [shade(rng, name) for name in inks]
    chosen = rng.choice(len(digits), size=2, replace=False)
    frames, masks = [], []
    for step in np.linspace(0, 1, FRAMES):
        frame, mask = still.copy(), np.zeros((VIDEO_PX, VIDEO_PX), np.uint8)
        for number, (digit, color) in enumerate(zip(chosen, colors, strict=True)):
            along = step if number == 0 else 1 - step
            place = Placement(
                size=0.42, x=0.25 + 0.5 * along, y=0.27 + 0.46 * number, angle=0.6 * (along - 0.5)
            )
            coverage = ink_mask(digits.ink[digit], VIDEO_PX, place)
            frame += (color - frame) * coverage[:, :, None]
            mask[coverage > _INK] = number + 1
        frames.append(np.clip(frame + 0.5, 0, 255).astype(np.uint8))
        masks.append(mask)
    return frames, masks


def write_videos(digits: Digits, folder: Path) -> None:
    """Writes the frames and masks of each video, and the first video as a file."""
    for video in range(len(VIDEOS)):
        frames, masks = draw_video(digits, video)
        for kind, pictures in (("images", frames), ("masks", masks)):
            place = folder / "videos" / kind / f"{video}"
            place.mkdir(parents=True, exist_ok=True)
            for number, pixels in enumerate(pictures):
                Image.fromarray(pixels).save(place / f"{number:05}.png")
        if video == 0:
            write_video_file(frames, folder / "video.mkv")


def write_video_file(frames: list[np.ndarray], file: Path) -> None:
    """Encodes frames without loss."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=12)
        stream.width, stream.height, stream.pix_fmt = VIDEO_PX, VIDEO_PX, "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Writes the scenes, the videos and the names of the classes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", metavar="DIR", type=Path)
    folder = parser.parse_args().folder
    write_scenes(training_digits().part(slice(SCENES[0])), folder / "scenes" / "train", seed=1)
    write_scenes(held_out().part(slice(SCENES[1])), folder / "scenes" / "test", seed=2)
    write_videos(held_out(), folder)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", "utf-8")
    print(f"{folder}: scenes, {len(VIDEOS)} videos")


if __name__ == "__main__":
    main()
