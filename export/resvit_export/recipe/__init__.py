"""Every setting of a run: one frozen value, from which the command line, the file and the Python interface are made."""
