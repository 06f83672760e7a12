"""ONNX graphs to engines."""
