"""A network as a function from arrays to arrays, by ONNX Runtime."""
