"""A release for many devices: in waves, watched, stopped and taken back."""
