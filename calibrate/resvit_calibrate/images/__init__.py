"""Pixels and preprocessing: from a file to what a network reads."""
