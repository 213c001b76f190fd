"""Exact folds of an exported program."""
