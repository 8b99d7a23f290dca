"""Benchmarks of the engines against PyTorch and other runtimes; not part of the wheel."""
