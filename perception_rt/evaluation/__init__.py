"""Evaluation of packages: task scores with intervals, and what a precision or fine-tune costs."""
