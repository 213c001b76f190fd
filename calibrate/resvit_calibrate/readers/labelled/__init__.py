"""What tools for labelling write, and lists of boxes: regions of pictures, read as boxes or as masks."""
