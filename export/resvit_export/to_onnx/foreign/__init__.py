"""What exporters of others write, as our own export writes it."""
