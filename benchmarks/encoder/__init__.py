"""The runners of `embed.py`: eager, plain ONNX and engines, each in a process of its own."""
