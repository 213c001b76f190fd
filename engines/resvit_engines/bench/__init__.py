"""How fast a runner is, with the clocks on record."""
