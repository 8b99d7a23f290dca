"""Exports a checkpoint as an engine package.

```
from perception_rt.export import ExportOptions, export

manifest = export(ExportOptions(model="PE-Core-B16-224", precision="int8", out="pe-b16"))
```

Both names are imported on first use: `ExportOptions` loads no torch, `export` does.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perception_rt.export.build import export
    from perception_rt.export.options import ExportOptions
else:

    def __getattr__(name):
        if name == "export":
            from perception_rt.export.build import export

            return export
        if name == "ExportOptions":
            from perception_rt.export.options import ExportOptions

            return ExportOptions
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["ExportOptions", "export"]
