"""Which product gets which precision."""
