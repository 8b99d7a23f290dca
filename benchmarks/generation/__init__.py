"""The runners of `generate.py`: transformers, onnxruntime-genai and engines."""
