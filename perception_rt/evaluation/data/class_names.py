"""Class names and templates: from files, and those of ImageNet that the package ships."""

import json
from functools import cache
from importlib.resources import files

from perception_rt.errors import InputError
from perception_rt.evaluation.data.files import read_names

IMAGENET = "imagenet"


def read_classes(source: str) -> list[str]:
    """Class names from a file, or the 1000 of ImageNet for "imagenet".

    Raises:
        InputError: the file is unusable.
    """
    return _imagenet()["classes"] if source == IMAGENET else read_names(source, "class file")


def read_templates(source: str) -> list[str]:
    """Templates from a file, or the 80 usual ones of ImageNet for "imagenet"; `{c}` becomes `{}`.

    Raises:
        InputError: the file is unusable, or a template has no place for the class name.
    """
    if source == IMAGENET:
        return _imagenet()["templates"]
    templates = [line.replace("{c}", "{}") for line in read_names(source, "template file")]
    for template in templates:
        if "{}" not in template:
            raise InputError(
                f"template {template!r:.100} of {source!r:.200} has no {{}} for the class name"
            )
    return templates


@cache
def _imagenet() -> dict[str, list[str]]:
    asset = files("perception_rt.evaluation") / "assets" / "imagenet.json"
    found: dict[str, list[str]] = json.loads(asset.read_text("utf-8"))
    return found
