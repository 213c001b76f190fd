"""Networks as exported programs."""
