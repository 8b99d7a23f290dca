"""The commands `perception-rt` and `perception-export`."""

from perception_rt.cli.commands import export_main, main

__all__ = ["export_main", "main"]
