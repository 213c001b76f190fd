"""Many builds: models by precisions by targets, here or over the machines of a Ray cluster."""
