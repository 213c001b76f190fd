"""The stages: each one value and one function."""
