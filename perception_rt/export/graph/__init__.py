"""From a traced module to an ONNX file: tracing, lowering, weights, writing."""
