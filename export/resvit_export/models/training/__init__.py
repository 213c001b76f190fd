"""Training of the reference hybrids, for the examples alone."""
