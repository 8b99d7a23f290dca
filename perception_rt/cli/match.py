"""The command `perception-rt match`: lines between the matching patches of two images."""

import argparse
from typing import Any

from perception_rt.cli.arguments import CommandParser, output_path, package_arguments
from perception_rt.errors import InputError, escaped
from perception_rt.progress import Progress

_HEIGHT, _MAX_HEIGHT = 448, 4096  # of the picture, in pixels
_LINES = 50


def add_match_arguments(match: CommandParser) -> None:
    """Adds the arguments of `match`."""
    package_arguments(match)
    match.add_argument("first", metavar="A", help="an image")
    match.add_argument("second", metavar="B", help="another image")
    match.add_argument("--layer", type=int, default=-1, help="block index (default: -1)")
    match.add_argument("--out", required=True, metavar="FILE.png", help="picture to write")
    match.add_argument(
        "--lines", type=int, default=_LINES, metavar="N", help="most lines, the best matches first "
        "(default: 50)"
    )  # fmt: skip
    match.add_argument(
        "--height", type=int, default=_HEIGHT, metavar="PX", help="of the picture (default: 448)"
    )


class MatchCommand:
    """One call of `match`: checks all that needs no engine, then matches and draws.

    Raises:
        InputError: the options are unusable.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        if not 1 <= options.height <= _MAX_HEIGHT:
            raise InputError(f"--height must be from 1 to {_MAX_HEIGHT}, not {options.height}")
        if options.lines < 1:
            raise InputError(f"--lines must be at least 1, not {options.lines}")
        self._out = output_path("--out", options.out, ".png")

    def run(self, engine: Any, progress: Progress) -> dict[str, Any]:
        """Writes the picture; returns the matches."""
        from perception_rt.processing.correspondence import draw_matches, mutual_matches
        from perception_rt.processing.image import decode_image
        from perception_rt.processing.image_options import image_options

        options = self._options
        paths = [options.first, options.second]
        dense = engine.features(paths, options.layer, on_progress=progress.counter("images"))
        matches = mutual_matches(*dense)
        images = [
            decode_image(
                path,
                options=image_options(options.formats, options.background),
                upright=engine.image_spec.exif_orientation,
            )
            for path in paths
        ]
        drawn = matches.best(options.lines)
        grids = [dense.shape[1:3]] * 2
        draw_matches(images, grids, drawn, height=options.height).save(self._out)
        pairs = zip(matches.first, matches.second, matches.cosines, strict=True)
        return {
            "images": paths,
            "grid": list(dense.shape[1:3]),
            "matches": len(matches),
            "drawn": len(drawn),
            "picture": str(self._out),
            "patches": [
                {"first": first.tolist(), "second": second.tolist(), "cosine": float(cosine)}
                for first, second, cosine in pairs
            ],
        }

    def show(self, result: dict[str, Any]) -> None:
        """Prints a line."""
        counts = f"{result['matches']} matches, {result['drawn']} drawn"
        print(f"{escaped(result['picture'])}: {counts}")
