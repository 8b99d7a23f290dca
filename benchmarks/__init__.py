"""Measurements of the engines against PyTorch and a plain ONNX export; not part of the wheel."""
