"""Rounding learned from the calibration images."""
