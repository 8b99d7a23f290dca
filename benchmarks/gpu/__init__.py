"""Parts of `gpu_check.py`: PyTorch models and engines, timed on a GPU."""
