"""Hook of the wheel's build: compiles the native decoder if there is a C++ compiler.

Without one, the wheel is pure Python and everything but the native decoder works.
"""

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeDecoderHook(BuildHookInterface):  # type: ignore[misc, type-arg]
    """Adds the library to a wheel and gives the wheel the platform's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the library in place; `version` is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        sys.path.insert(0, self.root)
        try:
            from perception_rt.native.build import BuildError, build
        finally:
            sys.path.remove(self.root)
        try:
            library = build()
        except BuildError as error:
            self.app.display_warning(f"without the native decoder: {error}")
            return
        build_data["artifacts"].append(library.relative_to(Path(self.root)).as_posix())
        build_data["pure_python"] = False
        name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{name}"  # ctypes needs no particular Python
