"""What ``kernels.py`` measures: the shapes of real hybrids, and other ways to compute the same."""
