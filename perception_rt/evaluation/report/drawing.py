"""Draws the pictures of a report: a confusion matrix, a histogram, a sheet of items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
RGB = tuple[int, int, int]

_WHITE, _BLACK, _GREY = (255, 255, 255), (20, 20, 20), (130, 130, 130)
_BLUE: RGB = (31, 97, 166)
RIGHT: RGB = (46, 139, 87)
WRONG: RGB = (200, 60, 50)
_MARGIN = 16
_CELL_PX = 34  # of a matrix with counts
_MAX_COUNTED = 40  # classes whose cells have counts, and whose names are written
_MATRIX_PX = 1000  # of a matrix without
_NAME_PX = 130  # longest name
_THUMBNAIL_PX = 150
_COLUMNS = 6
_LINE_PX = 17
_TITLE_PX = 720  # least width of a picture
_BINS = 40
_PLOT = (720, 320)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """An item of a sheet.

    Attributes:
        images: its pictures, side by side.
        lines: lines of text below them.
        color: frame colour.
    """

    images: Sequence[Image.Image]
    lines: Sequence[str]
    color: RGB = _GREY


def confusion_picture(counts: Int64, names: Sequence[str], title: str) -> Image.Image:
    """Draws a confusion matrix (C, C): rows are right classes, colours shares of a row."""
    classes = len(counts)
    counted = classes <= _MAX_COUNTED
    cell = _CELL_PX if counted else max(1, _MATRIX_PX // classes)
    labels = 30 + (_names_px(names) if counted else 0)
    left, top = _MARGIN + labels, _MARGIN + 30 + labels
    size = (max(left + cell * classes + _MARGIN, _TITLE_PX), top + cell * classes + _MARGIN)
    picture = Image.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), _cut(title, _font(16), size[0] - 2 * _MARGIN), _BLACK, _font(16))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    colors = np.array(_WHITE) + shares[:, :, None] * (np.array(_BLUE) - np.array(_WHITE))
    field = Image.fromarray(colors.round().astype(np.uint8))
    field = field.resize((cell * classes, cell * classes), Image.Resampling.NEAREST)
    picture.paste(field, (left, top))
    draw.rectangle((left - 1, top - 1, left + cell * classes, top + cell * classes), outline=_GREY)
    _write_axes(picture, (left, top), labels)
    if counted:
        _write_names(picture, names, (left, top), cell)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                place = (left + (column + 0.5) * cell, top + (row + 0.5) * cell)
                color = _WHITE if shares[row, column] > 0.5 else _BLACK
                draw.text(place, f"{count}", color, _font(12), anchor="mm")
    return picture


def _names_px(names: Sequence[str]) -> int:
    """Width of the longest name as it is written."""
    font = _font(13)
    return max(int(font.getlength(_cut(name, font, _NAME_PX))) for name in names)


def _write_axes(picture: Image.Image, corner: tuple[int, int], labels: int) -> None:
    left, top = corner
    ImageDraw.Draw(picture).text((left, top - labels), "answered", _GREY, _font(12), anchor="lt")
    _write_upwards(picture, "expected", (_MARGIN - 4, top), _GREY, anchor_end=True)


def _write_names(
    picture: Image.Image, names: Sequence[str], corner: tuple[int, int], cell: int
) -> None:
    left, top = corner
    draw, font = ImageDraw.Draw(picture), _font(13)
    for number, name in enumerate(names):
        shown, middle = _cut(name, font, _NAME_PX), int((number + 0.5) * cell)
        draw.text((left - 6, top + middle), shown, _BLACK, font, anchor="rm")
        _write_upwards(picture, shown, (left + middle - 8, top - 6), _BLACK)


def _write_upwards(
    picture: Image.Image, text: str, place: tuple[int, int], color: RGB, anchor_end: bool = False
) -> None:
    """Writes a text that reads from bottom to top and ends, or begins, at a height."""
    font = _font(13)
    length = int(font.getlength(text)) + 2
    line = Image.new("RGB", (length, 18), _WHITE)
    ImageDraw.Draw(line).text((0, 1), text, color, font)
    turned = line.transpose(Image.Transpose.ROTATE_90)
    x, y = place
    picture.paste(turned, (x, y if anchor_end else y - length))


def histogram_picture(values: Float64, title: str, axis: str) -> Image.Image:
    """Draws how often values occur, (N,), over their range."""
    width, height = _PLOT
    picture = Image.new("RGB", (width, height), _WHITE)
    draw, font = ImageDraw.Draw(picture), _font(13)
    draw.text((_MARGIN, _MARGIN), _cut(title, _font(16), width - 2 * _MARGIN), _BLACK, _font(16))
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9:  # all are equal
        low, high = low - 1e-6, high + 1e-6
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    left, right, top, bottom = 60, width - _MARGIN - 24, 56, height - 60
    for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True):
        x0, x1 = (left + (edge - low) / (high - low) * (right - left) for edge in (start, stop))
        y = bottom - (bottom - top) * count / counts.max()
        if count:
            draw.rectangle((x0, y, x1 - 1, bottom), fill=_BLUE)
    draw.line((left, bottom, right, bottom), fill=_BLACK)
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + fraction * (right - left)
        draw.line((x, bottom, x, bottom + 4), fill=_BLACK)
        value = low + fraction * (high - low)
        draw.text((x, bottom + 8), f"{value:.6g}"[:9], _BLACK, font, anchor="mt")
    draw.text((left - 8, top), f"{counts.max()}", _BLACK, font, anchor="rm")
    draw.text((left - 8, bottom), "0", _BLACK, font, anchor="rm")
    draw.text(((left + right) / 2, height - 24), axis, _BLACK, font, anchor="mm")
    return picture


def sheet_picture(cells: Sequence[Cell], title: str) -> Image.Image:
    """Draws items in rows, each with its pictures and its lines."""
    wide = max(max(len(cell.images), 1) for cell in cells)
    lines = max(len(cell.lines) for cell in cells)
    columns = max(1, min(len(cells), _COLUMNS // wide))
    cell_width = wide * (_THUMBNAIL_PX + 6) + 10
    cell_height = _THUMBNAIL_PX + 16 + lines * _LINE_PX + 10
    rows = -(-len(cells) // columns)
    size = (
        max(2 * _MARGIN + columns * cell_width, _TITLE_PX),
        2 * _MARGIN + 34 + rows * cell_height,
    )
    picture = Image.new("RGB", size, _WHITE)
    draw, font = ImageDraw.Draw(picture), _font(13)
    draw.text((_MARGIN, _MARGIN), _cut(title, _font(16), size[0] - 2 * _MARGIN), _BLACK, _font(16))
    for number, cell in enumerate(cells):
        x = _MARGIN + number % columns * cell_width
        y = _MARGIN + 34 + number // columns * cell_height
        box = (x, y, x + cell_width - 8, y + cell_height - 10)
        draw.rectangle(box, outline=cell.color, width=2)
        for place, image in enumerate(cell.images):
            _paste(picture, image, (x + 5 + place * (_THUMBNAIL_PX + 6), y + 5))
        for row, line in enumerate(cell.lines):
            top = y + _THUMBNAIL_PX + 12 + row * _LINE_PX
            draw.text((x + 6, top), _cut(line, font, cell_width - 20), _BLACK, font)
    return picture


def _paste(picture: Image.Image, image: Image.Image, place: tuple[int, int]) -> None:
    """Pastes an image, scaled to the largest size that fits a thumbnail, into its middle."""
    scale = _THUMBNAIL_PX / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    enlarged = scale >= 2  # small pictures stay sharp
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC
    shown = image.convert("RGB").resize((width, height), method)
    x, y = place
    picture.paste(shown, (x + (_THUMBNAIL_PX - width) // 2, y + (_THUMBNAIL_PX - height) // 2))


def _cut(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """A text on one line, shortened to a width in pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}...") > room:
        text = text[:-1]
    return f"{text}..."


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
