"""Data and tools of the demo models: digits, scenes, questions."""
