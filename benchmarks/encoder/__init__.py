"""Parts of `embed.py`: PyTorch, a plain ONNX export and engines, as rows of one table."""
