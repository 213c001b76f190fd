"""Weights trained with the quantisers in the loop."""
