"""Checkpoints of a training run: written whole, found, read back."""
