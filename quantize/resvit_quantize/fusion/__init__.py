"""Parts of a graph that become one node of our own."""
