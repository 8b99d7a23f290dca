"""Makes a changed copy of a package: other files, graphs or fields of the manifest."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import open_package
from perception_rt.package.store import Stage


def repack(
    source: Path,
    dest: Path,
    *,
    files: Mapping[str, bytes] | None = None,
    leave_out: str | None = None,
    **changes: Any,
) -> str:
    """Publishes a changed copy; returns its directory.

    Args:
        source: a package.
        dest: directory of the copy.
        files: new contents of some files.
        leave_out: file to leave out.
        changes: fields of the manifest's `Content`.
    """
    with open_package(source) as package, Stage.create(dest) as stage:
        manifest = package.manifest
        for name in manifest.content.files:
            if name != leave_out:
                stage.write(name, [(files or {}).get(name) or package.read(name)])
        content = replace(manifest.content, files=dict(stage.entries), **changes)
        stage.seal(Manifest.create(content, record=manifest.record))
        stage.publish()
    return str(dest)
