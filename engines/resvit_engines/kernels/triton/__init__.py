"""The kernels themselves, in Triton; beside each lies its reference, one folder up."""
