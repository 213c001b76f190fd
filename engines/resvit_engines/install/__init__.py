"""Signed bundles installed on a device: one switch, and back."""
