"""A graph that measures its own activations."""
