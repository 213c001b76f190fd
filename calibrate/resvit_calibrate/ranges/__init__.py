"""From what was observed to the range of every activation."""
