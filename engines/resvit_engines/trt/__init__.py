"""Every call into TensorRT, and nothing else."""
