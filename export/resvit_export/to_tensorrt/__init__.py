"""From the validated ONNX to what a given TensorRT reads."""
