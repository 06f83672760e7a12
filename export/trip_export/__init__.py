"""From a checkpoint to a bundle: ONNX graphs, engines, parity with PyTorch, manifest."""
