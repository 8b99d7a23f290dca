"""Images or videos with captions: lines of JSON, CSV tables and CLIP_benchmark's tars."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception_rt.bulk.listing import Item
from perception_rt.bulk.sources import kind_of
from perception_rt.errors import InputError
from perception_rt.evaluation.data import webdataset
from perception_rt.evaluation.data.files import read_records, read_table
from perception_rt.evaluation.data.labelled import check_items, relative_names

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captioned:
    """Items with captions.

    Attributes:
        ids: name of each item, relative to the data's folder; unique.
        items: the images or videos, all of one kind.
        captions: the captions of all items.
        owners: number of the item that each caption describes, int64 (captions,).
    """

    ids: Sequence[str]
    items: Sequence[Item]
    captions: Sequence[str]
    owners: Int64


def read_captioned(data: str) -> Captioned:
    """Reads items with captions.

    Args:
        data: a `.jsonl` file with lines such as `{"image": "a.jpg", "captions": ["A.", "B."]}`
            (`video` may replace `image`, `caption` with a string may replace `captions`); a `.csv`
            file with the columns `path` and `caption`; or a folder of tars in CLIP_benchmark's
            layout, with a caption per line of each `.txt` member. Paths are relative to the file.
            Lines or rows with the same path describe the same item.

    Raises:
        InputError: the data are missing or damaged, or an item has no caption.
    """
    ending = data.lower()
    root = os.path.dirname(data)  # noqa: PTH120
    if ending.endswith(".jsonl"):
        pairs = _from_lines(data, root)
    elif ending.endswith(".csv"):
        pairs = _from_table(data, root)
    elif Path(data).is_dir():
        pairs, root = _from_tars(data), data
    else:
        raise InputError(
            f"data {data!r:.200} must be a .jsonl or .csv file, or a folder of tars with captions"
        )
    items: dict[Item, int] = {}
    captions, owners = list[str](), list[int]()
    for item, caption in pairs:
        owners.append(items.setdefault(item, len(items)))
        captions.append(caption)
    if not items:
        raise InputError(f"data {data!r:.200} have no items")
    ids = relative_names(items, root)
    check_items(list(items), ids)
    return Captioned(
        ids=ids, items=list(items), captions=captions, owners=np.array(owners, np.int64)
    )


def _from_lines(data: str, root: str) -> Iterator[tuple[Item, str]]:
    for number, record in read_records(data):
        where = f"line {number} of {data!r:.200}"
        kinds = [kind for kind in ("image", "video") if isinstance(record.get(kind), str)]
        if len(kinds) != 1:
            raise InputError(f"{where} must have a path in 'image' or 'video'")
        path = os.path.join(root, record[kinds[0]])  # noqa: PTH118
        for caption in _captions(record, where):
            yield Item("video" if kinds[0] == "video" else "image", path), caption


def _captions(record: dict[str, Any], where: str) -> list[str]:
    found = record.get("captions", record.get("caption"))
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not captions:
        raise InputError(f"{where} must have a text in 'caption', or a list in 'captions'")
    if not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise InputError(f"{where} has a caption that is no text")
    return captions


def _from_table(data: str, root: str) -> Iterator[tuple[Item, str]]:
    for _, (path, caption) in read_table(data, ("path", "caption")):
        yield Item(kind_of(path) or "image", os.path.join(root, path)), caption  # noqa: PTH118


def _from_tars(data: str) -> Iterator[tuple[Item, str]]:
    for item, text in webdataset.samples(data, "test", "txt"):
        captions = [line.strip() for line in text.splitlines() if line.strip()]
        if not captions:
            raise InputError(f"{item.source!r:.200} has no caption")
        yield from ((item, caption) for caption in captions)
