"""ONNX graphs as the passes read them."""
