"""Equal functions that quantise better: smoothing, shifting, corrected biases."""
