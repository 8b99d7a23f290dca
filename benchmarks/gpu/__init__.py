"""The measurements of `gpu_check.py` on a GPU."""
