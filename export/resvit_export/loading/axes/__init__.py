"""Axes of a traced network: sizes that stay free, and where the batch of an output lies."""
