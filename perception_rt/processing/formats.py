"""Recognises and opens the image formats that are decoded on request only.

`containers.py` reads the headers of the others.
"""

import io
from collections.abc import Callable
from typing import Any

from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import TiffImageFile

from perception_rt.errors import BackendError

_SIGNATURES = (
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),  # of more than 4 GiB
    (b"MM\0+", "tiff"),
)
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_MOST_BRANDS = 64

# Called directly, since Image.open() applies process-wide limits and warns about them.
_DECODERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "avif": AvifImageFile,
    "bmp": BmpImageFile,
    "gif": GifImageFile,
    "tiff": TiffImageFile,
}


def requested_format(data: bytes) -> str | None:
    """Returns the format of `FORMATS_ON_REQUEST` that a file's first bytes claim, or None."""
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4], "big"), 8 + 4 * _MOST_BRANDS)
    brands = {data[at : at + 4] for at in range(8, end, 4)}
    if brands & _AVIF:  # AVIF files have the brand mif1 too
        return "avif"
    return "heic" if brands & _HEIC else None


def open_requested(data: bytes, name: str) -> Image.Image:
    """Reads the header of a file and leaves its pixels for later.

    Args:
        data: the file.
        name: its format, as `requested_format` returns it.

    Raises:
        BackendError: the library that decodes the format is not installed.
        Exception: of any kind, from the decoder, if the file is damaged.
    """
    decoder = _heic_decoder() if name == "heic" else _DECODERS[name]
    return decoder(io.BytesIO(data))


def check_decoder(name: str) -> None:
    """BackendError if the library that decodes a format is not installed."""
    if name == "heic":
        _heic_decoder()


def _heic_decoder() -> Any:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise BackendError(
            'a HEIC image needs pillow-heif: pip install "perception_rt[heic]"'
        ) from None
    return HeifImageFile
