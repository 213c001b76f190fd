"""An ONNX graph as a differentiable torch module."""
