"""Checkpoints of a training run: saving, finding, verifying, loading."""
