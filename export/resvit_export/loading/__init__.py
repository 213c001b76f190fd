"""Whatever names a network becomes a network."""
