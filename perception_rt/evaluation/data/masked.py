"""Images with masks: a folder `images`, and a folder `masks` with PNG files of the same names."""

import os
from dataclasses import dataclass
from pathlib import Path

from perception_rt.bulk.listing import Item
from perception_rt.bulk.sources import kind_of
from perception_rt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedImage:
    """An image and its mask.

    Attributes:
        name: path of the image in its folder, without ending, such as "dogs/00012".
        image: the image.
        mask: the mask; None if there is none.
    """

    name: str
    image: Item
    mask: Item | None

    @property
    def folder(self) -> str:
        """Folder part of `name`, "" without one."""
        return self.name.rpartition("/")[0]


def read_masked(data: str) -> list[MaskedImage]:
    """Lists the images of a folder with their masks, in the order of their names.

    Args:
        data: a folder with the folders `images` and `masks`, which may be links and may have
            folders with the same names.

    Raises:
        InputError: a folder is missing, there is no image, a mask has no image, or two images have
            the same name but for the ending.
    """
    images = _files(data, "images")
    masks = _files(data, "masks")
    if not images:
        raise InputError(f"{data!r:.200} has no images in the folder images")
    for name in sorted(masks):
        if name not in images:
            raise InputError(f"mask {masks[name]!r:.200} has no image {name!r:.100} beside it")
    return [
        MaskedImage(
            name=name,
            image=Item("image", images[name]),
            mask=Item("image", masks[name]) if name in masks else None,
        )
        for name in sorted(images)
    ]


def _files(data: str, kind: str) -> dict[str, str]:
    """Path of each image below a folder by its name without ending."""
    root = Path(data) / kind
    if not root.is_dir():
        raise InputError(f"data {data!r:.200} must be a folder with the folders images and masks")
    found: dict[str, str] = {}
    for folder, _, files in os.walk(root, followlinks=True):
        for file in files:
            path = Path(folder, file)
            if file.startswith(".") or kind_of(file) != "image":
                continue
            name = path.relative_to(root).with_suffix("").as_posix()
            if name in found:
                raise InputError(f"{found[name]!r:.200} and {str(path)!r:.200} have one name")
            found[name] = str(path)
    return found
