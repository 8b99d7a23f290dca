"""The version, read by the build and written into every package's provenance."""

__version__ = "0.1.0"
