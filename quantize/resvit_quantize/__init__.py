"""Everything that changes the numbers of a network: folding, Q/DQ placement, FP16 conversion."""
