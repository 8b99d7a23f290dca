"""Metrics as pure functions on NumPy arrays; docs/evaluation.md says what each was checked with."""
