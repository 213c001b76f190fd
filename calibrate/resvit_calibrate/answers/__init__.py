"""What networks answer: how outputs are kept, scored against what is known, and compared."""
