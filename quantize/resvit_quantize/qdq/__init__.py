"""From a plan to the graph: Q/DQ pairs, stored weights, FP16."""
