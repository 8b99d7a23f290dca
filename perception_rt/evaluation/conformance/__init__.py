"""Conformance of a package to the library whose weights it has: timm, open_clip or transformers."""
