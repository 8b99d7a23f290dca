"""Reads and writes checkpoints: file formats, name tables, strict checks, hub download."""
