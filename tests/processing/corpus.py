"""Hostile and odd image files, built in memory, each with its expected result."""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30

DISALLOWED = (
    "AVIF", "BLP", "BMP", "DDS", "DIB", "EPS", "GIF", "ICNS", "ICO", "JPEG2000", "MSP",
    "PCX", "PDF", "PPM", "QOI", "SGI", "SPIDER", "TGA", "TIFF", "XBM",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A file; `size` is the decoded (width, height), or None if it must raise InputError."""

    name: str
    data: bytes
    size: tuple[int, int] | None


def picture() -> Image.Image:
    """Noise, 40x30, with a white upper left corner."""
    pixels = np.random.default_rng(0).integers(0, 128, (HEIGHT, WIDTH, 3), np.uint8)
    pixels[:8, :8] = 255
    return Image.fromarray(pixels)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of filtered rows; `colour` 0 is grey, 2 is RGB."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(data, 9))
        + png_chunk(b"IEND", b"")
    )


def jpeg_with_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header declares another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def webp_lossless_header(width: int, height: int) -> bytes:
    """A WebP of at most 16,384 pixels a side that ends after its header."""
    bits = (width - 1) | (height - 1) << 14
    payload = b"\x2f" + struct.pack("<I", bits) + b"\x88\x88\x08" + bytes(24)
    body = b"WEBPVP8L" + struct.pack("<I", len(payload)) + payload
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif_block(orientation: int) -> bytes:
    """An EXIF block of one entry, without the prefix that JPEG needs."""
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)


def corpus() -> list[Case]:
    """All cases; the names are unique."""
    cases = [*_valid(), *_truncated(), *_foreign(), *_odd_png(), *_odd_jpeg(), *_odd_webp()]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def _valid() -> Iterator[Case]:
    image, size = picture(), (WIDTH, HEIGHT)
    yield Case("jpeg", encode(image, "JPEG"), size)
    yield Case("jpeg progressive", encode(image, "JPEG", progressive=True), size)
    yield Case("jpeg 4:4:4", encode(image, "JPEG", subsampling=0), size)
    yield Case("jpeg grey", encode(image.convert("L"), "JPEG"), size)
    yield Case("jpeg cmyk", encode(image.convert("CMYK"), "JPEG"), size)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield Case(f"png {mode}", encode(_as_mode(image, mode), "PNG"), size)
    palette = image.convert("P")
    yield Case("png P alpha", encode(palette, "PNG", transparency=bytes(range(256))), size)
    yield Case("png P one colour clear", encode(palette, "PNG", transparency=3), size)
    yield Case("png RGB one colour clear", encode(image, "PNG", transparency=(1, 2, 3)), size)
    yield Case("webp", encode(image, "WEBP"), size)
    yield Case("webp lossless", encode(image, "WEBP", lossless=True), size)
    yield Case("webp alpha", encode(image.convert("RGBA"), "WEBP"), size)
    others = [Image.new("RGB", size, (0, 0, i)) for i in range(200)]
    for kind in ("PNG", "WEBP"):
        data = encode(image, kind, save_all=True, append_images=others)
        yield Case(f"animated {kind}", data, size)
    for orientation in range(10):
        exif = b"Exif\0\0" + exif_block(orientation)
        turned = size[::-1] if 5 <= orientation <= 8 else size
        yield Case(f"jpeg orientation {orientation}", encode(image, "JPEG", exif=exif), turned)
    yield Case("png orientation 6", encode(image, "PNG", exif=exif_block(6)), size[::-1])
    yield Case("webp orientation 6", encode(image, "WEBP", exif=exif_block(6)), size[::-1])


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode)


def _truncated() -> Iterator[Case]:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(picture(), kind)
        for tenth in range(1, 11):
            end = len(data) * tenth // 10 - (tenth == 10) * 40
            yield Case(f"{kind} cut to {tenth}/10", data[:end], None)


def _foreign() -> Iterator[Case]:
    image, size = picture(), (WIDTH, HEIGHT)
    jpeg, png = encode(image, "JPEG"), encode(image, "PNG")
    yield Case("no bytes", b"", None)
    yield Case("one byte", b"\xff", None)
    yield Case("zeros", bytes(1000), None)
    yield Case("noise", random.Random(0).randbytes(1000), None)
    yield Case("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", None)
    yield Case("html", b"<html><script>alert(1)</script></html>", None)
    yield Case("jpeg signature alone", jpeg[:3], None)
    yield Case("png signature alone", png[:8], None)
    yield Case("png signature on a jpeg", png[:8] + jpeg[8:], None)
    yield Case("jpeg and zip", jpeg + b"PK\x05\x06" + bytes(18), size)
    yield Case("zip and jpeg", b"PK\x03\x04" + bytes(26) + jpeg, None)
    yield Case("png and html", png + b"<html></html>", size)
    yield Case("jpeg with html in a comment", encode(image, "JPEG", comment=b"<html>"), size)
    Image.init()
    for kind in DISALLOWED:
        if kind not in Image.SAVE:
            continue
        mode = "1" if kind in ("MSP", "XBM") else "P" if kind == "BLP" else "RGB"
        try:
            data = encode(image.convert(mode), kind)
        except (OSError, ValueError, KeyError):  # this build of Pillow cannot write it
            continue
        yield Case(f"format {kind}", data, None)


def _odd_png() -> Iterator[Case]:
    size = (WIDTH, HEIGHT)
    png = encode(picture(), "PNG")
    rows = (b"\0" + bytes(WIDTH * 3)) * HEIGHT

    def inserted(*chunks: bytes) -> bytes:
        return png[:33] + b"".join(chunks) + png[33:]

    yield Case("png 1x1 interlaced", _interlaced(), (1, 1))
    yield Case("png 16-bit RGB", png_file(2, 2, (b"\0" + b"\x80\xff" * 6) * 2, depth=16), (2, 2))
    yield Case("png width 0", png_file(0, 30, b""), None)
    yield Case("png height 0", png_file(40, 0, b""), None)
    yield Case("png width 2^31", png_file(2**31, 1, b""), None)
    yield Case("png no rows", png_file(*size, b""), None)
    # A complete stream with too few rows: Pillow leaves the others black.
    yield Case("png half the rows", png_file(*size, rows[: len(rows) // 2]), size)
    yield Case("png too many rows", png_file(*size, rows * 100), size)
    yield Case("png filter 9", png_file(*size, b"\x09" + rows[1:]), None)
    yield Case("png damaged header sum", png[:29] + bytes(4) + png[33:], None)
    yield Case("png damaged data", png[:60] + bytes(20) + png[80:], None)
    bomb = b"k\0\0" + zlib.compress(bytes(20 * 2**20))
    yield Case("png text bomb", inserted(png_chunk(b"zTXt", bomb)), size)
    yield Case("png profile bomb", inserted(png_chunk(b"iCCP", bomb)), size)
    yield Case("png 100 text bombs", inserted(*[png_chunk(b"zTXt", bomb)] * 100), size)
    yield Case("png bad animation", inserted(png_chunk(b"acTL", bytes(8))), size)
    yield Case("png bad exif", inserted(png_chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")), size)
    yield Case("png 200,000 chunks", inserted(*[png_chunk(b"tEXt", b"")] * 200_000), None)
    yield Case("png chunk of 4 GiB", inserted(b"\xff\xff\xff\xfftEXt"), None)


def _interlaced() -> bytes:
    data = bytearray(png_file(1, 1, b"\0abc"))
    data[28] = 1
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def _odd_jpeg() -> Iterator[Case]:
    size = (WIDTH, HEIGHT)
    jpeg = encode(picture(), "JPEG")
    progressive = encode(picture(), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    frame = jpeg.index(b"\xff\xc0")
    tables = jpeg.index(b"\xff\xc4")

    def inserted(*segments: bytes) -> bytes:
        return jpeg[:2] + b"".join(segments) + jpeg[2:]

    def segment(marker: int, payload: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload

    broken_exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 200
    yield Case("jpeg fill bytes", inserted(b"\xff" * 100), size)
    yield Case("jpeg huge exif", inserted(segment(0xE1, b"Exif\0\0" + bytes(65000))), size)
    yield Case("jpeg broken exif", inserted(segment(0xE1, broken_exif)), size)
    yield Case("jpeg exif without entries", inserted(segment(0xE1, b"Exif\0\0MM\0*")), size)
    yield Case("jpeg 300 profiles", inserted(*[segment(0xE2, bytes(60000))] * 300), size)
    yield Case("jpeg 200,000 comments", inserted(*[segment(0xFE, b"")] * 200_000), None)
    yield Case("jpeg 2,000 scans", progressive[:-2] + scan * 2000 + b"\xff\xd9", None)
    yield Case("jpeg no frame", jpeg[:frame] + jpeg[tables:], None)
    # Motion JPEG omits the tables; Pillow uses the standard ones.
    yield Case("jpeg no tables", jpeg[:tables] + jpeg[jpeg.index(b"\xff\xda") :], size)
    yield Case("jpeg no data", jpeg[:2] + b"\xff\xd9", None)
    yield Case("jpeg width 0", jpeg_with_size(jpeg, 0, HEIGHT), None)
    yield Case("jpeg long segment", jpeg[:2] + b"\xff\xe1\xff\xff" + bytes(10), None)
    yield Case("jpeg 12 bits", jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :], None)
    yield Case("jpeg two frames", inserted(segment(0xC0, b"\x08\0\x01\0\x01\x01\x01\x11\0")), None)


def _odd_webp() -> Iterator[Case]:
    webp = encode(picture(), "WEBP", lossless=True)
    extended = encode(picture(), "WEBP", exif=exif_block(1))
    yield Case("webp header alone", webp[:30], None)
    yield Case("webp unknown first chunk", webp[:12] + b"JUNK" + webp[16:], None)
    yield Case("webp two sizes", extended[:24] + b"\xff\0\0" + extended[27:], None)
    yield Case("webp length 0", webp[:4] + bytes(4) + webp[8:], None)
    yield Case("riff of another kind", webp[:8] + b"WAVE" + webp[12:], None)
