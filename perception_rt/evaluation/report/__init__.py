"""Figures of results, and their report: a JSON file with pictures."""
