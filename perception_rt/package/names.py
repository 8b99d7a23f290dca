"""Names of packages that are no paths: `demo:pe`, and `hf:org/name` for one on a hub.

What stands behind a name is found by the module that the table names, imported when such a name is
used. So opening a package knows no hub, and a path never imports one.
"""

import os

from perception_rt.demo import package_paths
from perception_rt.families import import_named

# Beginning of a name -> "module:function"; it takes the name and the required id, and returns the
# folder of the package and the id to require of it.
_FINDERS = {
    "demo:": "perception_rt.package.demo_cache:locate",
    "hf:": "perception_rt.hub:locate",
}


def locate(
    path: str | os.PathLike[str], expect: str | None = None
) -> tuple[str | os.PathLike[str], str | None]:
    """Replaces the name of a package by its folder; returns anything else as it is.

    Args:
        path: a path, "demo:pe" or "demo:plm", or "hf:org/name" or "hf:org/name@revision".
        expect: the required package id; None for any.

    Returns:
        The folder, and the id to require of it or None.

    Raises:
        InputError: there is no demo of this name, or it cannot name a package on a hub.
        PackageError: the package cannot be fetched or copied, or is not the expected one.
    """
    if not is_name(path):
        return path, expect
    folder: os.PathLike[str]
    folder, required = import_named(_FINDERS[_scheme(path)])(path, expect)
    return folder, required


def is_name(path: str | os.PathLike[str]) -> bool:
    """Whether `locate` looks a package up by its name; a Path, or a folder named so, is a path."""
    if _scheme(path) not in _FINDERS:
        return False
    return path in package_paths() or not os.path.lexists(path)


def _scheme(path: str | os.PathLike[str]) -> str:
    """The beginning of a name, with its colon."""
    return "".join(path.partition(":")[:2]) if isinstance(path, str) else ""
