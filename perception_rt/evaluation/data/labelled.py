"""Images or videos with a class each: folders, CSV tables and CLIP_benchmark's tars.

Legend: N items, C classes.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perception_rt.bulk.listing import Item
from perception_rt.bulk.sources import REQUESTED, Sources, kind_of
from perception_rt.errors import InputError
from perception_rt.evaluation.data import webdataset
from perception_rt.evaluation.data.files import read_table

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled:
    """Items with classes.

    Attributes:
        ids: name of each item, relative to the data's folder; unique.
        items: the images or videos, all of one kind.
        labels: class number of each item, int64 (N,).
        classes: names of the classes (C).
    """

    ids: Sequence[str]
    items: Sequence[Item]
    labels: Int64
    classes: Sequence[str]

    @property
    def labelled_classes(self) -> list[str]:
        """Names of the classes for tables: names that occur twice get their number."""
        counts = {name: self.classes.count(name) for name in set(self.classes)}
        return [
            name if counts[name] == 1 else f"{name} ({number})"
            for number, name in enumerate(self.classes)
        ]


def read_labelled(
    data: str, classes: Sequence[str] | None = None, *, split: str = "test"
) -> Labelled:
    """Reads items with classes.

    Args:
        data: a folder with a folder of files for each class; a `.csv` file with the columns `path`,
            relative to it, and `label`, a name or a number of a class; or a folder of tars in
            CLIP_benchmark's layout.
        classes: names of the classes, in the order of their numbers; None takes those of the data.
            Folders that all have such names are matched by name, others by order (numbers as
            numbers).
        split: folder of the tars.

    Raises:
        InputError: the data are missing, damaged or ambiguous, a class has no items, or a label is
            not one of the classes.
    """
    if data.lower().endswith(".csv"):
        found = _from_table(data, classes)
    elif webdataset.is_webdataset(data):
        found = _from_tars(data, classes, split)
    elif Path(data).is_dir():
        found = _from_folders(data, classes)
    else:
        raise InputError(
            f"data {data!r:.200} must be a folder with a folder per class, a .csv file, or a "
            "folder of tars"
        )
    check_items(found.items, found.ids)
    return found


def check_items(items: Sequence[Item], ids: Sequence[str]) -> None:
    """InputError unless items have distinct names and are of one kind."""
    if len({item.kind for item in items}) > 1:
        raise InputError("the data have images and videos: evaluate them one by one")
    if len(set(ids)) < len(ids):
        seen = set[str]()
        twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InputError(f"item {twice!r:.200} occurs twice")


def relative_names(items: Iterable[Item], root: str) -> list[str]:
    """Names of items relative to the folder of the data: the same wherever that folder is."""
    return [os.path.relpath(item.source, root).replace(os.sep, "/") for item in items]


def _from_folders(data: str, classes: Sequence[str] | None) -> Labelled:
    names = [entry.name for entry in os.scandir(data) if entry.is_dir() and entry.name[0] != "."]
    names = _ordered(names)
    if not names:
        raise InputError(f"data {data!r:.200} has no folder per class")
    if classes is None:
        numbers, classes = list(range(len(names))), names
    elif set(names) <= set(classes):
        numbers = [list(classes).index(name) for name in names]
    elif len(names) == len(classes):
        numbers = list(range(len(names)))
    else:
        odd = next(name for name in names if name not in classes)
        raise InputError(
            f"{len(classes)} class names, but {data!r:.200} has {len(names)} folders, and "
            f"{odd!r:.60} is not one of the names"
        )
    items, labels = list[Item](), list[int]()
    for number, name in zip(numbers, names, strict=True):
        folder = os.path.join(data, name)  # noqa: PTH118 - keeps a leading "./"
        found = list(Sources(paths=(folder,), formats=tuple(REQUESTED)).items())
        items += found
        labels += [number] * len(found)
    return _labelled(items, labels, classes, data)


def _from_table(data: str, classes: Sequence[str] | None) -> Labelled:
    root = os.path.dirname(data)  # noqa: PTH120
    items, names, lines = list[Item](), list[str](), list[int]()
    for line, (path, name) in read_table(data, ("path", "label")):
        items.append(Item(kind_of(path) or "image", os.path.join(root, path)))  # noqa: PTH118
        names.append(name)
        lines.append(line)
    if classes is None:
        classes = _ordered(set(names))
    by_name = {name: number for number, name in enumerate(classes)}
    labels = []
    for line, name in zip(lines, names, strict=True):
        where = f"line {line} of {data!r:.200}"
        if name in by_name and list(classes).count(name) > 1:
            raise InputError(f"{where}: two classes are named {name!r:.60}; use their numbers")
        labels.append(by_name[name] if name in by_name else _number(name, classes, where))
    return _labelled(items, labels, classes, root)


def _from_tars(data: str, classes: Sequence[str] | None, split: str) -> Labelled:
    named = webdataset.class_names(data) if classes is None else classes
    items, labels = list[Item](), list[int]()
    for item, text in webdataset.samples(data, split, "cls"):
        if named is None:
            raise InputError(f"data {data!r:.200} have no classnames.txt: give the class names")
        items.append(item)
        labels.append(_number(text.strip(), named, f"the label of {item.source!r:.200}"))
    return _labelled(items, labels, named or (), data)


def _labelled(
    items: Sequence[Item], labels: Sequence[int], classes: Sequence[str], root: str
) -> Labelled:
    if not items:
        raise InputError("the data have no items")
    return Labelled(
        ids=relative_names(items, root), items=items, labels=np.array(labels, np.int64),
        classes=list(classes),
    )  # fmt: skip


def _number(text: str, classes: Sequence[str], where: str) -> int:
    """A class number; InputError if the text is none."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < len(classes)):
        raise InputError(
            f"{where}: {text!r:.60} is neither the name of a class nor a number below "
            f"{len(classes)}"
        )
    return int(text)


def _ordered(names: Iterable[str]) -> list[str]:
    """Names in order; if all are numbers, by number."""
    found = list(names)
    numeric = all(name.isascii() and name.isdecimal() for name in found)
    return sorted(found, key=(lambda n: (int(n), n)) if numeric else None)
