"""Reads folders of tars in the layout of CLIP_benchmark.

```
FOLDER/classnames.txt                          names of the classes, one per line
FOLDER/zeroshot_classification_templates.txt   sentences with {c} for the class name
FOLDER/test/nshards.txt                        number of tars
FOLDER/test/0.tar, 1.tar, ...                  x.jpg beside x.cls, or x.jpg beside x.txt
```
"""

from collections.abc import Iterator
from pathlib import Path

from perception_rt.bulk.contents import Contents
from perception_rt.bulk.listing import Item
from perception_rt.bulk.sources import kind_of
from perception_rt.bulk.tars import tar_files
from perception_rt.errors import InputError
from perception_rt.evaluation.data.files import read_names, read_text

_CLASSES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_SHARDS = "nshards.txt"


def is_webdataset(folder: str) -> bool:
    """Whether a folder has this layout."""
    root = Path(folder)
    return (root / _CLASSES).is_file() or any(root.glob(f"*/{_SHARDS}"))


def class_names(folder: str) -> list[str] | None:
    """Names of the classes; None if the folder has none."""
    path = Path(folder) / _CLASSES
    return read_names(str(path), "class file") if path.is_file() else None


def template_file(folder: str) -> str | None:
    """Path of the file of templates; None if the folder has none."""
    path = Path(folder) / _TEMPLATES
    return str(path) if path.is_file() else None


def samples(folder: str, split: str, ending: str) -> Iterator[tuple[Item, str]]:
    """Yields each picture or video of a split, and the text of the member beside it.

    Args:
        folder: a folder of this layout.
        split: folder of the tars, such as "test".
        ending: suffix of the text members, "cls" or "txt".

    Raises:
        InputError: a file is missing or damaged, or a sample lacks one of the two members.
    """
    with Contents() as contents:
        for path in _shards(Path(folder) / split):
            for key, members in _grouped(str(path)):
                where = f"sample {key!r:.100} of {str(path)!r:.200}"
                pictures = [item for item in members.values() if item.kind != "text"]
                if len(pictures) != 1:
                    raise InputError(f"{where} has {len(pictures)} images or videos, not one")
                if ending not in members:
                    raise InputError(f"{where} has no .{ending} member")
                yield pictures[0], contents.text(members[ending])


def _shards(folder: Path) -> list[Path]:
    file = folder / _SHARDS
    text = read_text(str(file), "number of shards").strip()
    if not text.isdecimal() or not 1 <= len(text) <= 6 or int(text) == 0:
        raise InputError(f"{str(file)!r:.200} must have the number of shards, not {text!r:.40}")
    return [folder / f"{number}.tar" for number in range(int(text))]


def _grouped(path: str) -> Iterator[tuple[str, dict[str, Item]]]:
    """Key and members by ending of each sample of a tar, whose members follow one another."""
    current, members = "", dict[str, Item]()
    seen = set()
    for member in tar_files(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
        if key != current:
            if members:
                yield current, members
            if key in seen:
                raise InputError(f"sample {key!r:.100} of {path!r:.200} occurs twice")
            seen.add(key)
            current, members = key, {}
        place = (path, member.offset_data, member.size)
        kind = kind_of(base) or "text"
        members[ending] = Item(kind, f"{path}#{member.name}", "span", *place)
    if members:
        yield current, members
