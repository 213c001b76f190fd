"""How a compiled kernel becomes a layer of a TensorRT engine."""
