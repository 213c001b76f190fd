"""Which edges get a Q/DQ pair, and the grids that they round to."""
