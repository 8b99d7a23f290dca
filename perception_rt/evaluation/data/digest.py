"""Digest of the data of an evaluation: two reports with the same digest had the same items."""

import hashlib
import json

from perception_rt.bulk.listing import Item
from perception_rt.errors import InputError
from perception_rt.evaluation.outcomes import TaskResult
from perception_rt.evaluation.tasks import OnProgress
from perception_rt.processing.files import open_regular_file

_BLOCK = 1024 * 1024


def data_digest(result: TaskResult, on_progress: OnProgress) -> str:
    """SHA-256 of the names, texts and right answers of all items, and of their files' bytes.

    Raises:
        InputError: a file is gone, or became shorter.
    """
    digest = hashlib.sha256()
    items: dict[Item, None] = {}
    for name, part in result.parts.items():
        record = [name, list(part.ids), list(part.texts), list(part.expected)]
        digest.update(json.dumps(record, sort_keys=True).encode("ascii") + b"\n")
        items.update(dict.fromkeys([*part.pictures, *part.files]))
    for done, item in enumerate(items, 1):
        if item.form in ("file", "span"):
            digest.update(_content_digest(item))
        if done % 256 == 0 or done == len(items):
            on_progress("files hashed", done, len(items))
    return f"sha256:{digest.hexdigest()}"


def _content_digest(item: Item) -> bytes:
    digest = hashlib.sha256()
    span = item.form == "span"
    left = item.size
    with open_regular_file(item.file, repr(item.file)) as file:
        try:
            file.seek(item.offset)
            while block := file.read(min(left, _BLOCK) if span else _BLOCK):
                digest.update(block)
                left -= len(block)
        except OSError as error:
            raise InputError(f"{item.file!r:.200} cannot be read: {error.strerror}") from None
    if span and left:
        raise InputError(f"{item.file!r:.200} became shorter")
    return digest.digest()
