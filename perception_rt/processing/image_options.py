"""Choices about opening images: formats beside the usual ones, and a background."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import ImageColor

from perception_rt.errors import InputError, describe
from perception_rt.processing.formats import check_decoder
from perception_rt.records import plain_number

RGB: TypeAlias = tuple[int, int, int]
Background: TypeAlias = str | Sequence[int]

# Accepted on request only: rarer in practice, and more code that reads untrusted bytes.
FORMATS_ON_REQUEST = ("avif", "bmp", "gif", "heic", "tiff")
_ALWAYS = ("jpeg", "png", "webp")
_ALIASES = {"heif": "heic", "jpg": "jpeg", "tif": "tiff"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How images are opened; `image_options` makes one from a user's arguments.

    Attributes:
        formats: formats to accept beside JPEG, PNG and WebP, of `FORMATS_ON_REQUEST`.
        background: colour behind transparent pixels; None drops the alpha channel, as the
            reference does.
    """

    formats: frozenset[str] = frozenset()
    background: RGB | None = None


DEFAULT_IMAGE_OPTIONS = ImageOptions()


def image_options(
    formats: Iterable[str] = (), background: Background | None = None
) -> ImageOptions:
    """Checks a user's arguments.

    Args:
        formats: names such as "gif", or one string of names separated by commas.
        background: colour name, "#rrggbb", or red, green and blue from 0 to 255.

    Raises:
        BackendError: the library that decodes a format is not installed.
        InputError: a format or a colour is unknown.
    """
    return ImageOptions(
        formats=_formats(formats), background=None if background is None else _colour(background)
    )


def _formats(formats: Iterable[str]) -> frozenset[str]:
    if isinstance(formats, str):
        formats = filter(None, map(str.strip, formats.split(",")))
    if not isinstance(formats, Iterable):
        raise InputError(f"formats must be a list of names, not {describe(formats)}")
    found = set()
    for name in formats:
        known = name.strip().lower() if isinstance(name, str) else name
        known = _ALIASES.get(known, known) if isinstance(known, str) else known
        if known not in FORMATS_ON_REQUEST + _ALWAYS:
            shown = f"{name!r:.60}" if isinstance(name, str) else describe(name)
            raise InputError(f"formats must be of {list(FORMATS_ON_REQUEST)}, not {shown}")
        check_decoder(known)
        found.add(known)
    return frozenset(found - set(_ALWAYS))


def _colour(value: Background) -> RGB:
    """Red, green and blue."""
    if isinstance(value, str):
        try:
            channels: Sequence[int] = ImageColor.getrgb(value)
        except ValueError:
            channels = ()
        if len(channels) == 4 and channels[3] == 255:
            channels = channels[:3]
    else:
        channels = [plain_number(c) for c in value] if isinstance(value, list | tuple) else ()
    if len(channels) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in channels):
        shown = f"{value!r:.60}" if isinstance(value, str | list | tuple) else describe(value)
        raise InputError(
            "background must be an opaque colour such as 'white', '#rrggbb' or three integers from "
            f"0 to 255, not {shown}"
        )
    red, green, blue = channels
    return red, green, blue
