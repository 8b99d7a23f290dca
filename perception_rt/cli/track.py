"""The command `perception-rt track`: masks of a video's frames from those of its first frame."""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perception_rt.cli.arguments import CommandParser, package_arguments
from perception_rt.errors import InputError, escaped
from perception_rt.progress import Progress

_CHUNK = 32  # frames whose features are in memory at once
_SHOWN = 6  # frames of the picture
_HEIGHT = 256  # of each, in pixels
PICTURE = "overlay.png"


def add_track_arguments(track: CommandParser) -> None:
    """Adds the arguments of `track`."""
    package_arguments(track)
    track.add_argument("video", metavar="VIDEO", help="a video, or a folder of its frames")
    track.add_argument(
        "--mask", required=True, metavar="FIRST.png", help="mask of the first frame: a PNG with a "
        "number per pixel, grey or with a palette, 0 for the background"
    )  # fmt: skip
    track.add_argument(
        "--out", required=True, metavar="DIR", help="folder to make: a mask of each frame, and "
        "overlay.png"
    )  # fmt: skip
    track.add_argument("--layer", type=int, default=-1, help="block index (default: -1)")
    for name, kind, text in (
        ("--context-frames", int, "latest frames to take labels from (default: 7)"),
        ("--radius", int, "patches that labels move between frames; 0: any number (default: 12)"),
        ("--top-k", int, "most similar patches to take labels from (default: 5)"),
        ("--temperature", float, "weights are exp(cosine / temperature) (default: 0.1)"),
    ):
        metavar = "N" if kind is int else "T"
        track.add_argument(name, type=kind, metavar=metavar, help=text)


class TrackCommand:
    """One call of `track`: checks all that needs no engine, then tracks, writes and draws.

    Raises:
        InputError: the options are unusable.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from perception_rt.processing.label_propagation import PropagationSettings
        from perception_rt.processing.masks import read_mask

        self._options = options
        names = ("context_frames", "radius", "top_k", "temperature")
        given = {name: getattr(options, name) for name in names}
        self._settings = PropagationSettings(**{k: v for k, v in given.items() if v is not None})
        self._mask = read_mask(options.mask)
        if not self._mask.any():
            raise InputError(f"mask {options.mask!r:.80} has no object: all pixels are 0")
        self._out = Path(options.out)
        if not self._out.parent.is_dir():
            raise InputError(f"cannot write {options.out!r:.80}: its folder is missing")
        if self._out.exists() and not (self._out.is_dir() and not any(self._out.iterdir())):
            raise InputError(f"--out {options.out!r:.80} exists; name a new or an empty folder")

    def run(self, engine: Any, progress: Progress) -> dict[str, Any]:
        """Writes the masks and the picture, all or none; returns their number and place."""
        from perception_rt.processing.label_propagation import track_masks
        from perception_rt.processing.masks import mask_image, overlay
        from perception_rt.processing.pca import stacked

        options = self._options
        frames = self._frames(engine)
        shown = {i * (len(frames) - 1) // (_SHOWN - 1) for i in range(_SHOWN)}
        count = progress.counter("frames")
        pictures = []
        features = _features(engine, frames, options.layer)
        staging = Path(tempfile.mkdtemp(prefix=f".{self._out.name}.", dir=self._out.parent))
        try:
            for number, mask in enumerate(track_masks(features, self._mask, self._settings)):
                mask_image(mask).save(staging / f"{number:05}.png")
                if number in shown:
                    pictures.append(_fitted(overlay(self._open(frames[number]), mask)))
                count(number + 1, len(frames))
            rows = [pictures[start : start + 3] for start in range(0, len(pictures), 3)]
            stacked([_in_row(row) for row in rows]).save(staging / PICTURE)
            staging.chmod(0o755)
            staging.replace(self._out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return {"frames": len(frames), "masks": str(self._out), "picture": PICTURE}

    def show(self, result: dict[str, Any]) -> None:
        """Prints a line."""
        print(f"{escaped(result['masks'])}: {result['frames']} masks, {result['picture']}")

    def _frames(self, engine: Any) -> Sequence[Any]:
        """Paths of the frames, or the frames of a video at the model's size."""
        from perception_rt.bulk.sources import Sources
        from perception_rt.processing.video import load_all_frames

        video = self._options.video
        if not Path(video).is_dir():
            return list(load_all_frames(video, engine.image_spec))
        frames = [item for item in Sources(paths=(video,)).items() if item.kind == "image"]
        if not frames:
            raise InputError(f"folder {video!r:.80} has no images")
        return [item.source for item in frames]

    def _open(self, frame: Any) -> Any:
        from perception_rt.processing.image import decode_image
        from perception_rt.processing.image_options import image_options

        return decode_image(
            frame, options=image_options(self._options.formats, self._options.background)
        )


def _features(engine: Any, frames: Sequence[Any], layer: int) -> Iterator[Any]:
    for start in range(0, len(frames), _CHUNK):
        yield from engine.features(frames[start : start + _CHUNK], layer)


def _fitted(image: Any) -> Any:
    width = max(1, min(4 * _HEIGHT, round(_HEIGHT * image.width / image.height)))
    return image.resize((width, _HEIGHT))


def _in_row(images: Sequence[Any]) -> Any:
    from PIL import Image

    row = Image.new("RGB", (sum(i.width for i in images) + 8 * (len(images) - 1), _HEIGHT), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + 8
    return row
