"""Reads the headers of JPEG, PNG and WebP images without decoding pixels.

Removes from JPEG and PNG the metadata that the decoder does not need (EXIF, ICC, XMP, text,
animation), so that none of it reaches the decoder. A WebP image stays whole.
"""

import re
import struct
from dataclasses import dataclass

from perception_rt.errors import InputError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_ALPHA = b"tRNS"

_SOI, _EOI, _SOS, _APP1, _COM = 0xD8, 0xD9, 0xDA, 0xE1, 0xFE
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# JFIF (APP0) and Adobe (APP14) define the colour space; the other APP markers are metadata.
_JPEG_DROPPED = frozenset(range(0xE1, 0xF0)) - {0xEE} | {_COM}
_JPEG_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}  # markers without a length

# Real files have far fewer. Each costs time, which the limit on bytes does not bound.
_MAX_PARTS = 20_000
_MAX_SCANS = 1_000

_ORIENTATION_TAG, _SHORT = 0x0112, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An encoded image and the facts in its header.

    Attributes:
        format: "JPEG", "PNG" or "WEBP".
        width: stored width in pixels, before the orientation is applied.
        height: stored height in pixels, before the orientation is applied.
        orientation: EXIF orientation, 1 to 8; 1 if absent or damaged.
        data: the bytes to decode.
    """

    format: str
    width: int
    height: int
    orientation: int
    data: bytes


def read_container(data: bytes, *, transparency: bool = False) -> EncodedImage:
    """Reads the header of a JPEG, PNG or WebP file; InputError for anything else.

    Args:
        data: the file.
        transparency: whether the decoder needs the transparent colours of a PNG without alpha.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _read_png(data, (*_PNG_KEPT, _PNG_ALPHA) if transparency else _PNG_KEPT)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _read_webp(data)
    raise InputError("is not a JPEG, PNG or WebP image")


def exif_orientation(exif: bytes) -> int:
    """Returns the orientation in an EXIF block, 1 to 8; 1 if absent or damaged."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for i in range(min(count, (len(tiff) - start - 2) // 12)):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * i)
        if tag == _ORIENTATION_TAG:
            return value if kind == _SHORT and 1 <= value <= 8 else 1
    return 1


def _read_jpeg(data: bytes) -> EncodedImage:
    kept = [data[:2]]
    size: tuple[int, int] | None = None
    orientation = 1
    for marker, start, end in _jpeg_segments(data):
        payload = data[start + 4 : end]
        if marker in _SOF and len(payload) >= 6:
            size = struct.unpack_from(">HH", payload, 1)
        if marker == _APP1 and payload.startswith(b"Exif\0\0") and orientation == 1:
            orientation = exif_orientation(payload)
        if marker == _SOS:
            end = len(data)  # the scans reach to the end of the file
            if data.count(b"\xff\xda", start) > _MAX_SCANS:
                raise InputError(f"has more than {_MAX_SCANS} scans")
        if marker not in _JPEG_DROPPED:
            kept.append(data[start:end])
    if size is None:
        raise InputError("is a JPEG image without a frame header")
    return EncodedImage(
        format="JPEG", width=size[1], height=size[0], orientation=orientation, data=b"".join(kept)
    )


def _jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) of each segment, up to and including the first scan's header."""
    segments: list[tuple[int, int, int]] = []
    marker_at = re.compile(rb"\xff[\x01-\xfe]")  # skips fill bytes and stray bytes between segments
    at = 2
    while len(segments) < _MAX_PARTS:
        found = marker_at.search(data, at)
        if found is None:
            raise InputError("is a JPEG image that ends within its header")
        start = found.start()
        marker = data[start + 1]
        if marker == _EOI:
            raise InputError("is a JPEG image without image data")
        if marker in _JPEG_BARE or marker == _SOI:
            at = start + 2
            segments.append((_COM, start, at))  # has no payload; dropped like a comment
            continue
        if start + 4 > len(data):
            raise InputError("is a JPEG image that ends within its header")
        at = start + 2 + max(2, struct.unpack_from(">H", data, start + 2)[0])
        if at > len(data):
            raise InputError("is a JPEG image that ends within its header")
        segments.append((marker, start, at))
        if marker == _SOS:
            return segments
    raise InputError(f"is a JPEG image of more than {_MAX_PARTS} segments")


def _read_png(data: bytes, kinds: tuple[bytes, ...]) -> EncodedImage:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise InputError("is a PNG image without a header")
    width, height = struct.unpack_from(">II", data, 16)
    kept = [_PNG_SIGNATURE]
    orientation = 1
    at = 8
    for _ in range(_MAX_PARTS):
        if at + 8 > len(data):
            break  # truncated; the decoder reports it
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in kinds:
            kept.append(data[at:end])
        elif kind == b"eXIf":
            orientation = exif_orientation(data[at + 8 : at + 8 + length])
        if kind == b"IEND":
            break
        at = end
    else:
        raise InputError(f"is a PNG image of more than {_MAX_PARTS} chunks")
    return EncodedImage(
        format="PNG", width=width, height=height, orientation=orientation, data=b"".join(kept)
    )


def _read_webp(data: bytes) -> EncodedImage:
    width, height = _webp_size(data[12:16], data[20:30])
    orientation = 1
    at = 12
    for _ in range(_MAX_PARTS):
        if at + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            orientation = exif_orientation(data[at + 8 : at + 8 + length])
            break
        at += 8 + length + length % 2
    else:
        raise InputError(f"is a WebP image of more than {_MAX_PARTS} chunks")
    return EncodedImage(
        format="WEBP", width=width, height=height, orientation=orientation, data=data
    )


def _webp_size(kind: bytes, payload: bytes) -> tuple[int, int]:
    """Width and height from the first 10 bytes of the first chunk."""
    if len(payload) == 10 and kind == b"VP8X":
        fields = int.from_bytes(payload[4:7], "little"), int.from_bytes(payload[7:10], "little")
        return fields[0] + 1, fields[1] + 1
    if len(payload) == 10 and kind == b"VP8 " and payload[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", payload, 6)
        return width & 0x3FFF, height & 0x3FFF
    if len(payload) == 10 and kind == b"VP8L" and payload[0] == 0x2F:
        bits = int.from_bytes(payload[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise InputError("is a WebP image without a header")
