"""2:4 sparsity for sparse tensor cores."""
