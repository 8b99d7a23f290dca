"""One lowering per backend, and TensorRT's engine builder."""
