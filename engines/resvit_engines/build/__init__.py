"""An ONNX graph becomes an engine, in a child process that may crash or be killed without harm."""
