"""The command `perception-rt features`: draws dense features or attention maps of images."""

import argparse
from pathlib import Path
from typing import Any

from perception_rt.cli.arguments import CommandParser, list_argument, output_path, package_arguments
from perception_rt.errors import InputError, escaped
from perception_rt.progress import Progress

_HEIGHT, _MAX_HEIGHT = 448, 4096  # of a picture, in pixels


def add_features_arguments(features: CommandParser) -> None:
    """Adds the arguments of `features`."""
    package_arguments(features)
    list_argument(features, "--image", "FILE", required=True)
    what = features.add_mutually_exclusive_group()
    what.add_argument("--layer", type=int, default=-1, help="block index (default: -1)")
    what.add_argument(
        "--attention", action="store_true", help="draw where the pooling probe looks instead"
    )
    features.add_argument(
        "--out", required=True, metavar="FILE.png", help="picture to write, with a row for each "
        "image; or a folder for a picture of each"
    )  # fmt: skip
    features.add_argument(
        "--shared", action="store_true", help="same colours for the same features in all images"
    )
    features.add_argument("--smooth", action="store_true", help="interpolate between patches")
    features.add_argument(
        "--height", type=int, default=_HEIGHT, metavar="PX", help="of each picture (default: 448)"
    )


class FeaturesCommand:
    """One call of `features`: checks all that needs no engine, then runs and draws.

    Raises:
        InputError: the options are unusable.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        if not 1 <= options.height <= _MAX_HEIGHT:
            raise InputError(f"--height must be from 1 to {_MAX_HEIGHT}, not {options.height}")
        if options.attention and options.shared:
            raise InputError("--shared is for features; attention maps have no colours to share")
        self._is_sheet = options.out.endswith(".png")
        if self._is_sheet:
            self._files = [output_path("--out", options.out, ".png")]
            return
        folder = Path(options.out)
        if not folder.is_dir():
            raise InputError(f"--out must end in .png or be a folder, not {options.out!r:.80}")
        self._files = [folder / f"{Path(image).stem}.png" for image in options.image]
        names = [file.name for file in self._files]
        for image, name in zip(options.image, names, strict=True):
            if names.count(name) > 1:
                raise InputError(f"--image {image!r:.80}: two images would become {name!a:.80}")

    def run(self, engine: Any, progress: Progress) -> list[dict[str, Any]]:
        """Writes the pictures; returns image, shape and picture of each."""
        from perception_rt.processing.image import decode_image
        from perception_rt.processing.image_options import image_options
        from perception_rt.processing.pca import beside, heat_colors, principal_colors, stacked

        options = self._options
        count = progress.counter("images")
        if options.attention:
            maps = engine.attention_maps(options.image, on_progress=count)
            colors = [heat_colors(heads.mean(axis=0)) for heads in maps]
            shape = maps.shape[1:]
        else:
            dense = engine.features(options.image, options.layer, on_progress=count)
            groups = [dense] if options.shared else [dense[i : i + 1] for i in range(len(dense))]
            colors = [drawn for group in groups for drawn in principal_colors(group)]
            shape = dense.shape[1:]
        pictures = []
        for image, drawn in zip(options.image, colors, strict=True):
            picture = decode_image(
                image,
                options=image_options(options.formats, options.background),
                upright=engine.image_spec.exif_orientation,
            )
            pictures.append(beside(picture, drawn, height=options.height, smooth=options.smooth))
        if self._is_sheet:
            pictures = [stacked(pictures)]
        for file, picture in zip(self._files, pictures, strict=True):
            picture.save(file)
        files = self._files * (len(options.image) if self._is_sheet else 1)
        return [
            {"image": image, "shape": list(shape), "picture": str(file)}
            for image, file in zip(options.image, files, strict=True)
        ]

    def show(self, results: list[dict[str, Any]]) -> None:
        """Prints a line for each image."""
        layer = self._options.layer
        what = "attention maps" if self._options.attention else f"features of layer {layer}"
        for result in results:
            shape = "x".join(map(str, result["shape"]))
            print(f"{escaped(result['picture'])}: {shape} {what}")
