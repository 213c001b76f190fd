"""What the compiler made of a graph: which Q/DQ and which attention fused."""
