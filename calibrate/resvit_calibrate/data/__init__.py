"""Images to calibrate with, to validate on and to train on, from whatever the user named."""
